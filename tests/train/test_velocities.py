"""The velocity cache: what is in it, how it is written, and that nothing else passes for it."""

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.train import teach
from gossamer.train.draws import DRAW_SEED
from gossamer.train.files import sha256
from gossamer.train.model import velocity
from gossamer.train.noise import Uniform, add_noise, sample_noise
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import LOCK, RunLock
from gossamer.train.teach import write_cache
from gossamer.train.velocities import MANIFEST, VelocityCache, clips_of, name_of

DRAWS = 3
CACHED = {"teacher": "cached", "noise_draws": DRAWS}


@pytest.fixture
def cached(make_job: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function: settings -> a job whose cache lies in tmp_path/cache."""
    common = {**CACHED, "teacher__path": tmp_path / "cache"}
    return lambda **settings: make_job(**{**common, **settings})


@pytest.fixture
def written(cached: Callable[..., Any], tmp_path: Path) -> Path:
    write_cache(cached(), tmp_path / "cache")
    return tmp_path / "cache"


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def refused(job: Any) -> str:
    with pytest.raises(Refusal) as error:
        job.teacher()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_cache_holds_the_teachers_velocity_of_every_draw_in_bf16(
    written: Path, cached: Any
) -> None:
    job = cached()
    dataset, dense = job.dataset("train"), job.dense()
    tensors = {k: v for f in written.glob("*.safetensors") for k, v in load_file(f).items()}
    assert sorted(map(int, tensors)) == list(range(len(dataset)))
    for index in (0, 4, 9):
        clip = dataset[index]
        latent, text = clip["latent"][None], clip["text"][None]
        for draw in range(DRAWS):
            t, noise = sample_noise(Uniform(), latent, [(DRAW_SEED, index, draw)])
            x = add_noise(latent, noise, t)
            with torch.no_grad():
                live = velocity(dense, x, t, text, clip["condition"][None])[0]
            stored = tensors[str(index)][draw]
            assert stored.dtype == torch.bfloat16
            difference = (stored.double() - live.double()).abs()
            assert (difference <= 2**-8 * live.double().abs() + 1e-6).all()
            assert torch.equal(VelocityCache.open(written).read([index], [draw])[0], stored.float())


def test_the_manifest_says_what_the_velocities_were_made_for(written: Path, cached: Any) -> None:
    manifest = manifest_of(written)
    assert set(manifest["request"]) == {
        "teacher",
        "data",
        "split",
        "noise",
        "draws",
        "draw_seed",
        "guidance",
    }
    assert manifest["request"]["noise"] == {"_target_": "gossamer.train.noise.Uniform"}
    assert (manifest["dtype"], manifest["precision"], manifest["clips"]) == ("bfloat16", "no", 10)
    assert manifest["files"] == {f.name: sha256(f) for f in written.glob("*.safetensors")}
    assert len(manifest["files"]) == 10
    assert {p.name for p in written.iterdir()} == {MANIFEST, LOCK, *manifest["files"]}


def test_files_cover_the_clips_once_and_keep_to_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clips:
        def __len__(self) -> int:
            return 1000

        largest = (0,)

        def shape(self, index: int) -> tuple[int, ...]:
            return 4, 4, 8, 16

    for most, largest in ((2**30, 16), (2 * DRAWS * 4 * 4 * 8 * 16 * 5, 5), (1, 1)):
        monkeypatch.setattr(teach, "FILE_BYTES", most)
        files = teach._files(Clips(), DRAWS)  # type: ignore[arg-type]
        assert [clip for clips in files for clip in clips] == list(range(1000))
        assert max(map(len, files)) == largest
        assert all(clips_of(name_of(clips)) == clips for clips in files)


def test_a_finished_cache_is_left_alone(written: Path, cached: Any) -> None:
    before = {f: f.stat().st_mtime_ns for f in written.iterdir()}
    write_cache(cached(), written)
    assert {f: f.stat().st_mtime_ns for f in written.iterdir()} == before


def test_an_interrupted_cache_goes_on_with_the_files_it_has(
    written: Path, cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = teach.write_atomic, [4]  # begun.json and three files

    def dies(path: Path, content: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    folder = tmp_path / "broken"
    job = cached(teacher__path=folder)
    with monkeypatch.context() as patch:
        patch.setattr(teach, "write_atomic", dies)
        with pytest.raises(KeyboardInterrupt):
            write_cache(job, folder)
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}
    assert len(before) == 3 and "velocity cache with" in refused(job)
    write_cache(job, folder)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert manifest_of(folder) == manifest_of(written)


def test_a_cache_that_another_run_writes_is_refused(cached: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with RunLock(folder), pytest.raises(Refusal, match=r"teacher\.path=.*no other run writes"):
        write_cache(cached(), folder)
    write_cache(cached(), folder)
    cached().teacher()


def test_a_worker_of_a_sweep_waits_for_the_cache_that_another_writes(
    written: Path, cached: Any
) -> None:
    before = {f: f.stat().st_mtime_ns for f in written.glob("*.safetensors")}
    unfinished, other = (written / MANIFEST).rename(written / "later"), RunLock(written)
    with ExitStack() as held:
        held.enter_context(other)
        held.callback(unfinished.rename, written / MANIFEST)
        finish = threading.Timer(0.5, held.pop_all().close)
    job = cached()
    job.kept = {}
    finish.start()
    write_cache(job, written)
    assert not unfinished.exists(), "it waited"
    assert {f: f.stat().st_mtime_ns for f in written.glob("*.safetensors")} == before


def test_files_begun_for_other_noise_do_not_stay(
    written: Path, cached: Any, tmp_path: Path
) -> None:
    other = manifest_of(written)["files"]
    begun = {"request": {"noise": "other"}, "precision": "no"}
    (written / MANIFEST).rename(written / teach.BEGUN)
    (written / teach.BEGUN).write_text(json.dumps(begun))
    for name in other:
        (written / name).write_bytes(b"of another run")
    write_cache(cached(), written)
    assert manifest_of(written)["files"] == other
    cached().teacher()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "shifted"}, "noise there: "),
        ({"noise_draws": 2}, "draws there: 3, now: 2"),
        ({"guidance__negative_share": 0.1}, "guidance there: "),
        ({"guidance__scale": 2.0}, "guidance there: "),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    settings: dict[str, Any], said: str, written: Path, cached: Any
) -> None:
    message = refused(cached(**settings))
    assert message.startswith(f"teacher.path={written}: allowed is a cache of this run ({said}")
    with pytest.raises(Refusal, match="a cache of this run"):
        write_cache(cached(**settings), written)


def test_a_cache_of_other_data_is_refused(written: Path, cached: Any, tmp_path: Path) -> None:
    job = cached()
    shutil.copytree(job.cfg.data.dir, tmp_path / "data")
    file = tmp_path / "data" / "manifest.json"
    file.write_text(file.read_text() + "\n")
    assert "(data there: " in refused(cached(data__dir=tmp_path / "data"))


def test_a_cache_of_other_weights_is_refused(
    written: Path, cached: Any, lab: Any, tmp_path: Path
) -> None:
    shutil.copytree(lab.teacher, tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.2.weight"][3, 5] += 1e-6  # one element of one matrix
    save_file(tensors, file, metadata={"format": "pt"})
    assert "(teacher there: " in refused(cached(model__path=tmp_path / "other"))


@pytest.mark.parametrize("harm", ["a byte", "a file", "the manifest", "its format"])
def test_a_damaged_cache_is_refused(harm: str, written: Path, cached: Any) -> None:
    file = sorted(written.glob("*.safetensors"))[2]
    content, manifest = bytearray(file.read_bytes()), written / MANIFEST
    match harm:
        case "a byte":
            content[-7] ^= 1
            file.write_bytes(content)
            said = f"teacher.path={file}: allowed is a file as the manifest lists it"
        case "a file":
            file.unlink()
            said = f"teacher.path={file}: allowed is a file as the manifest lists it"
        case "the manifest":
            manifest.write_text(manifest.read_text()[:-9])
            said = "a manifest of format 1"
        case _:
            manifest.write_text(manifest.read_text().replace('version": 1', 'version": 2'))
            said = "it is of format 2"
    assert said in refused(cached())


def test_velocities_that_a_live_teacher_denies_are_refused(written: Path, cached: Any) -> None:
    manifest = manifest_of(written)
    for name in manifest["files"]:
        tensors = {k: (v.float() * 1.02).bfloat16() for k, v in load_file(written / name).items()}
        save_file(tensors, written / name)
        manifest["files"][name] = sha256(written / name)
    (written / MANIFEST).write_text(json.dumps(manifest))
    message = refused(cached())
    assert "within 0.0049 of a live teacher's (draw 0 of clip 1 is off by 0.02" in message
    cached(teacher__check=0).teacher()  # says the user: no live teacher


def test_every_seed_finds_its_draws_in_one_cache(written: Path, cached: Any) -> None:
    job = cached()
    teacher, dataset = job.teacher(), job.dataset("train")
    from gossamer.train.data.dataset import BatchSchedule, collate

    for seed in (0, 5):
        schedule, seen = BatchSchedule(len(dataset), 4, seed), set()
        for step in range(15):  # 60 samples are 6 epochs: every draw of every clip, twice
            batch = collate([dataset[i] for i in schedule.indices(step)])
            batch["position"] = torch.arange(4 * step, 4 * step + 4)
            noised = job.draws(seed)(batch)
            assert teacher.velocity(torch.nn.Identity(), noised).shape == noised.x.shape
            seen |= set(zip(noised.index, noised.draw, strict=True))
        assert len(seen) == DRAWS * len(dataset)


def test_the_default_folder_lies_with_the_data_and_changes_with_what_decides(
    make_job: Any,
) -> None:
    from gossamer.train.config import build

    def folder(**settings: Any) -> Path:
        cfg = make_job(**{**CACHED, **settings}).cfg
        return build(cfg.teacher).folder(cfg)

    first = folder()
    assert first.parent == Path(make_job().cfg.data.dir) and first == folder(steps=99, seed=3)
    others = [
        folder(noise="shifted"),
        folder(noise_draws=4),
        folder(guidance__scale=2.0),
        folder(model__path="elsewhere"),
    ]
    assert len({first, *others}) == 5


def test_a_run_with_a_cached_teacher_that_is_killed_ends_as_the_unbroken_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {
        **CACHED,
        "teacher__path": tmp_path / "cache",
        "stages": ["encode", "calibrate", "train"],
        "steps": 12,
        "checkpoint_every": 3,
        "grad_accumulation": 2,
        "guidance__scale": 2.0,
        "guidance__negative_prompt": "grey",
        "guidance__negative_share": 0.3,
    }
    done = launcher.run(lab.student(tmp_path / "a", **settings))
    assert done.code == 0, done.text
    assert "velocity cache" in done.text and "4 checked, off by 0.00" in done.text
    whole = lab.run(tmp_path / "a")
    overrides = lab.student(tmp_path / "b", **settings)
    for number in (1, 3):
        assert launcher.run(overrides, fault=(number, "after-rename")).code == -9
    done = launcher.run(overrides)
    assert done.code == 0 and "is already of this teacher" in done.text
    run = lab.run(tmp_path / "b")
    assert run.losses == whole.losses and run.weights == whole.weights


@pytest.mark.multi
def test_two_processes_write_the_cache_that_one_writes(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {**CACHED, "stages": ["encode"], "evaluation__batch_size": 1}

    def overrides(name: str) -> list[str]:
        return lab.student(tmp_path / name, teacher__path=tmp_path / f"cache-{name}", **settings)

    assert launcher.run(overrides("one")).code == 0
    for done in launcher.ranks(overrides("two")):
        assert done.code == 0, done.text
    assert manifest_of(tmp_path / "cache-one") == manifest_of(tmp_path / "cache-two")
