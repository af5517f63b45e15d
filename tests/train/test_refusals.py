"""Bad input ends in one line on stderr and exit code 2, soon, without a traceback or leftovers."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from gossamer.train.run_lock import RunLock

SECONDS = 10
BACKEND = {"backend": "triton"}
INTERPRET = {"TRITON_INTERPRET": "1"}
NATIVE = {"TRITON_INTERPRET": "0"}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}


def refused(launcher: Any, overrides: list[str], **options: Any) -> str:
    """Run the job, require a proper refusal, and return its line."""
    start = time.monotonic()
    done = launcher.run(overrides, **options)
    assert time.monotonic() - start < SECONDS
    assert done.code == 2, done.text
    assert "Traceback" not in done.text and len(done.errors) == 1, done.text
    assert done.text.endswith(f"{done.errors[0]}\n")
    return done.errors[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsty": 0.5}, ["sparsty=0.5", "did you mean sparsity?"]),
        ({"optimizer__lrr": 0.5}, ["did you mean optimizer.lr?"]),
        ({"sparsity": 1.0}, ["sparsity=1.0: allowed is a number in [0, 1)"]),
        ({"sparsity": -0.1}, ["sparsity=-0.1: allowed is a number in [0, 1)"]),
        ({"sparsity": "nan"}, ["sparsity=nan: allowed is a number in [0, 1)"]),
        ({"sparsity": 0.99}, ["at most 0.9688", "make the layout's blocks smaller"]),
        ({"backend": "hopper"}, ["for backend 'hopper'", "use backend='triton' or 'auto'"]),
        ({"layout__block": [0, 2, 2]}, ["block=0", "at least 1"]),
        ({"layout__block": [2, 2]}, ["[frames, height, width]"]),
        ({"device": "cuda"}, ["device=cuda: allowed is cpu or auto", "no CUDA device"]),
        ({"batch_size": 5, "grad_accumulation": 2}, ["a multiple of 2", "set batch_size=6"]),
        ({"repeat_seeds": [1, 0]}, ["other seeds than 0"]),
        ({"calibration__densities": [0.5, 0.1]}, ["two or more rising numbers"]),
        ({"calibration__path": "/no/such/folder"}, ["calibration.path=/no/such/folder"]),
        ({"model__path": "/no/such/model"}, ["model.path=/no/such/model", "download it"]),
        ({"data__dir": "/no/such/data"}, ["data.dir=/no/such/data", "run gossamer encode"]),
        ({"data__frames": 16}, ["data.frames=16: allowed is 8, as encoded in"]),
        ({"data__stride": 2}, ["data.stride=2: allowed is 4, as encoded in"]),
        ({"text__dim": 32}, ["text.dim=32: allowed is 16"]),
        ({"text__length": 8}, ["text.length=8: allowed is 4"]),
        ({"codec__channels": 8}, ["codec.channels=8: allowed is 4"]),
        ({"data__condition": "none"}, ["data.condition=none: allowed is first_frame"]),
        ({"stages": ["train"], "calibration__path": None}, ["run `gossamer calibrate` first"]),
        ({"stages": ["export"]}, ["a finished training"]),
        ({"stages": ["report"]}, ["run `gossamer evaluate`"]),
        ({"stages": ["train", "encode"]}, ["in this order"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_refused_before_any_work(
    settings: dict[str, Any], said: list[str], lab: Any, launcher: Any, tmp_path: Path
) -> None:
    line = refused(launcher, lab.student(tmp_path, **settings))
    assert all(words in line for words in said), line
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= {"run.lock"}


@pytest.mark.case("C6")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"env": NATIVE}, "device must be cuda for backend 'triton', got cpu"),
        (
            {"env": {**INTERPRET, **BF16}},
            "float32 or float16 under TRITON_INTERPRET=1, got torch.bfloat16",
        ),
        ({"hide": "triton"}, "triton, which is not installed; pip install 'triton"),
    ],
    ids=["cpu", "bf16", "not-installed"],
)
def test_triton_is_refused_where_it_cannot_run(
    options: dict[str, Any], said: str, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    assert said in refused(launcher, lab.student(tmp_path, **BACKEND), **options)


@pytest.mark.case("C8", "N4")
def test_fp16_is_refused_before_the_processes_meet(lab: Any, launcher: Any, tmp_path: Path) -> None:
    line = refused(launcher, lab.student(tmp_path), env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert "mixed_precision=fp16: allowed is no or bf16" in line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "correct the path"),
        (lambda path: path.mkdir(), "at least one video"),
        (lambda path: path.write_bytes(b"no film at all"), "1 of 1 videos unusable"),
    ],
    ids=["missing", "empty", "broken"],
)
def test_a_source_without_a_film_is_refused(
    make: Any, said: str, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    make(tmp_path / "source.mp4")
    data = {"data__source": tmp_path / "source.mp4", "data__dir": tmp_path / "data"}
    overrides = lab.student(tmp_path / "runs", stages=["encode", "calibrate", "train"], **data)
    assert said in refused(launcher, overrides)


def test_a_film_too_short_to_hold_out_a_clip_is_refused_before_the_training(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    write_one_shot(lab.film, tmp_path / "shot.mp4")
    data = {"data__source": tmp_path / "shot.mp4", "data__dir": tmp_path / "data"}
    stages = ["encode", "calibrate", "train", "evaluate"]
    line = refused(launcher, lab.student(tmp_path / "runs", stages=stages, **data))
    assert "data with heldout clips, for evaluate" in line and "more shots" in line


def write_one_shot(film: Path, path: Path, frames: int = 12) -> None:
    import av

    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            if number < frames:
                pixels = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"))
                target.mux(stream.encode(pixels))
        target.mux(stream.encode(None))


def test_damaged_shards_are_refused_by_name(lab: Any, launcher: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(lab.data, data)
    shard = next(data.glob("train-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for stages in (["calibrate", "train"], ["encode", "calibrate"]):
        overrides = lab.student(tmp_path, data__dir=data, stages=stages, calibration__path=None)
        line = refused(launcher, overrides)
        assert f"{shard.parent} damaged ({shard.name}" in line
    shard.unlink()
    assert "missing" in refused(launcher, lab.student(tmp_path, data__dir=data, name="new"))
    (data / "manifest.json").write_text("{")
    assert "a whole manifest" in refused(launcher, lab.student(tmp_path, data__dir=data))


def test_a_data_folder_of_another_request_is_refused(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other.mp4"
    other.write_bytes(lab.film.read_bytes() + b"\0" * 8)
    stages = ["encode", "calibrate"]
    line = refused(launcher, lab.student(tmp_path, data__source=other, stages=stages))
    assert "the same request (sources there: " in line


@pytest.mark.case("F8")
def test_a_run_folder_of_another_config_shows_the_difference_and_can_be_forced(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    shutil.copytree(unbroken.folder, tmp_path / "student")
    changes = {"steps": 10, "optimizer__lr": 5e-4}
    line = refused(launcher, lab.student(tmp_path, **changes))
    assert "steps: 8 -> 10" in line and "optimizer.lr: 0.001 -> 0.0005" in line
    assert "resume=force" in line
    never = refused(launcher, lab.student(tmp_path, resume="never"))
    assert "a new folder (resume=never)" in never
    done = launcher.run(lab.student(tmp_path, **changes, resume="force"))
    assert done.code == 0 and "steps: 8 -> 10" in done.text
    assert [row[0] for row in lab.run(tmp_path).losses] == list(range(1, 11))
    assert launcher.run(lab.student(tmp_path, **changes)).code == 0


@pytest.mark.parametrize("text", ["a: [", "- x", "x: ${y}", "a: !!python/object:os.system x"])
def test_a_run_folder_whose_config_cannot_be_read_is_refused(
    text: str, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.yaml").write_text(text)
    line = refused(launcher, lab.student(tmp_path))
    assert "a config that can be read" in line


@pytest.mark.case("F8")
def test_a_run_folder_that_cannot_be_written_is_refused(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(launcher, lab.student(tmp_path / "file"))
    assert "a folder to write into" in line


@pytest.mark.case("F9")
def test_a_checkpoint_of_another_model_is_refused_with_its_first_keys(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    deeper = {**lab.teacher_settings, "name": "deeper", "model.num_layers": 3, "steps": 1}
    assert launcher.run(lab.overrides(tmp_path, deeper)).code == 0
    shutil.copytree(unbroken.folder / "checkpoints", tmp_path / "student" / "checkpoints")
    settings = {"model__path": tmp_path / "deeper" / "export", "calibration__path": None}
    line = refused(launcher, lab.student(tmp_path, **settings))
    assert "a checkpoint of this model (29 tensors differ: blocks.2." in line


@pytest.mark.case("F11")
def test_a_run_that_another_process_holds_is_refused(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    metrics = tmp_path / "student" / "metrics.jsonl"
    first = launcher.start(lab.student(tmp_path, steps=2000)).when(metrics.is_file)
    assert "a folder no other run writes" in refused(launcher, lab.student(tmp_path, steps=2000))
    assert first.kill().code == -9


def test_a_data_folder_that_another_process_fills_is_refused_and_later_shared(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    stages = ["encode", "calibrate"]
    overrides = lab.student(
        tmp_path, data__dir=tmp_path / "data", stages=stages, calibration__path=None
    )
    with RunLock(tmp_path / "data"):
        assert "data.dir=" in refused(launcher, overrides)
    assert launcher.run(overrides).code == 0
    with RunLock(tmp_path / "data"):
        assert launcher.run(overrides).code == 0
