"""The main job from a film to a report: what it leaves, and what a second call does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gossamer.train.check import preflight
from gossamer.train.config import compose, fingerprint, recipes, save_config
from gossamer.train.data import quarantine
from gossamer.train.run import run
from gossamer.train.run_dir import CONFIG, check_run_dir

ALL = ["encode", "calibrate", "train", "evaluate", "export", "report"]


@pytest.fixture(scope="module")
def whole(lab: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of every stage with two seeds, its overrides and what it said."""
    runs = tmp_path_factory.mktemp("whole")
    data = {"data.dir": runs / "data", "stages": ALL, "repeat_seeds": [7], "steps": 4}
    overrides = lab.overrides(runs, {**lab.student_settings, **data})
    done = launcher.run(overrides)
    assert done.code == 0, done.text
    return lab.run(runs), overrides, done.text


def test_a_run_leaves_what_the_design_says(whole: Any) -> None:
    run, overrides, said = whole
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "calibration/calibration.json",
        "checkpoints/step-4/manifest.json",
        "repeats/seed-7/checkpoints/step-4/manifest.json",
        "evaluation/evaluation.json",
        "export/transformer/diffusion_pytorch_model.safetensors",
        "export/sparse_attention_config.json",
        "export/sparse_attention.safetensors",
        "report/index.html",
        "report/masks.png",
        "report/moved.png",
    ):
        assert (run.folder / name).is_file(), name
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".pkl", ".bin", ".pt")]
    last = said.splitlines()[-3:]
    assert "relative velocity error to the dense teacher at sparsity 0.6" in last[0]
    assert last[1].endswith(f"export: {run.folder}/export")
    assert last[2].endswith(f"report: {run.folder}/report/index.html")
    result = json.loads((run.folder / "result.json").read_text())
    assert result["finished"] and result["config_fingerprint"] == fingerprint(compose(overrides))
    assert result["metrics"]["num_seeds"] == 2


def test_seeds_train_apart_from_the_same_start(whole: Any, lab: Any) -> None:
    run = whole[0]
    first, second = run.losses, lab.run(run.folder, "repeats/seed-7").losses
    assert [row[0] for row in first] == [row[0] for row in second] == [1, 2, 3, 4]
    assert not {row[1] for row in first} & {row[1] for row in second}


def test_a_second_call_does_nothing_twice(whole: Any, launcher: Any) -> None:
    run, overrides, _ = whole
    kept = [run.folder / name for name in ("metrics.jsonl", "calibration", "checkpoints", "export")]
    kept.append(run.folder.parent / "data")

    def stamps() -> dict[Path, int]:
        files = [file for path in kept for file in (path, *path.rglob("*"))]
        return {file: file.stat().st_mtime_ns for file in files}

    before = stamps()
    done = launcher.run([*overrides, "stages=[encode,calibrate,train,export]"])
    assert done.code == 0, done.text
    assert stamps() == before
    for words in ("already encoded", "at step 4 of 4", "already the export"):
        assert words in done.text


def test_a_run_folder_may_be_moved(whole: Any, launcher: Any, tmp_path: Path) -> None:
    run, overrides, _ = whole
    shutil.copytree(run.folder, tmp_path / "moved")
    place = [f"runs_dir={tmp_path}", "name=moved", "stages=[train]"]
    done = launcher.run([*overrides, *place])
    assert done.code == 0 and "at step 4 of 4" in done.text


def test_the_metrics_say_where_the_time_went(whole: Any) -> None:
    rows = [json.loads(line) for line in (whole[0].folder / "metrics.jsonl").open()]
    for row in rows:
        assert 0 < row["data_seconds"] < row["step_seconds"] < 10
        assert 0.3 < row["density"] < 0.5 and row["grad_norm"] > 0


def test_a_new_folder_belongs_to_any_config(whole: Any, tmp_path: Path) -> None:
    check_run_dir(compose(whole[1]), tmp_path)


def test_a_folder_belongs_to_its_config_whatever_credentials_are_in_it(tmp_path: Path) -> None:
    cfg = compose(["data=encoded", "data.dir='https://me:planted@host/data?token=planted'"])
    save_config(cfg, tmp_path / CONFIG)
    assert "planted" not in (tmp_path / CONFIG).read_text()
    check_run_dir(cfg, tmp_path)


def test_every_recipe_composes_and_the_demo_can_run(tmp_path: Path) -> None:
    for recipe in recipes():
        assert compose([f"recipe={recipe}"]).recipe_name == recipe
    cfg = compose(["recipe=demo", "device=cpu", f"data.dir={tmp_path}", f"runs_dir={tmp_path}"])
    assert preflight(cfg, list(cfg.stages))["backend"] == "reference"


def test_jobs_of_one_process_share_clips_but_neither_their_order_nor_what_is_left_out(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "BAD_SHARE", 1.0)
    kept: dict[Any, Any] = {}
    jobs = [make_job(name=name, data__window=w) for name, w in (("a", None), ("b", 1), ("c", None))]
    shard = jobs[0].whole_split("train").shards[0]
    listed = {"split": "train", "shard": shard.file, "row": 0, "clips": 1, "reason": "torn"}
    jobs[2].run_dir.mkdir(parents=True)
    (jobs[2].run_dir / quarantine.FILE).write_text(json.dumps(listed) + "\n")
    for job in jobs:
        job.kept = kept
    splits = [job.whole_split("train") for job in jobs]
    assert [split.window for split in splits] == [None, 1, None]
    assert [split.quarantine.holds(shard.file, 0) for split in splits] == [False, False, True]
    assert splits[2][0]["index"] != 0 == splits[0][0]["index"]
    assert splits[2]._open is splits[0]._open, "read once"


def test_jobs_of_one_process_keep_the_weights_of_one_model(make_job: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_job().source.path, model)
    kept: dict[Any, Any] = {}

    def job_of(seed: int) -> Any:
        job = make_job(name=f"seed-{seed}", seed=seed, model__path=model, calibration__path=None)
        job.kept = kept
        return job

    keys = [job_of(seed).weights_key for seed in (0, 1, 2)]
    assert len(set(keys)) == 1 and len([key for key in kept if key[0] == "weights"]) == 1
    measured = job_of(0).measured
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: x + 1 for name, x in tensors.items()}, file, {"format": "pt"})
    again = job_of(3)
    assert again.weights_key != keys[0], "the same path, other weights"
    assert again.measured != measured and len([key for key in kept if key[0] == "weights"]) == 1


def test_a_report_does_not_finish_a_run_that_lacks_its_export(
    whole: Any, tmp_path: Path, one_thread: None
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole[0].folder, folder)
    shutil.move(folder / "export", tmp_path / "export")
    cfg = compose([*whole[1], f"run_dir={folder}"])
    assert not run(cfg, ["report"])["finished"]
    shutil.move(tmp_path / "export", folder / "export")
    assert run(cfg, ["report"])["finished"]
