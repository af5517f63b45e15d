"""A run killed at any moment and started again ends as the unbroken run does, bit for bit."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from gossamer.train import checkpoint
from gossamer.train.files import sha256

STEPS = 16
SETTINGS = {"steps": STEPS, "checkpoint_every": 4, "ema": 0.9, "grad_accumulation": 2}
EVERYTHING = {
    **SETTINGS,
    "repeat_seeds": [1],
    "stages": ["encode", "calibrate", "train", "evaluate", "export"],
}


EXPORTED = (
    "transformer/diffusion_pytorch_model.safetensors",
    "sparse_attention.safetensors",
    "codec/pca.safetensors",
)


def kill_during_training(
    lab: Any, launcher: Any, runs: Path, after_rows: int, delay: float
) -> None:
    """Start or resume the run, and kill it `delay` seconds after a row of its metrics is there."""
    metrics = runs / "student" / "metrics.jsonl"

    def happened() -> bool:
        return metrics.is_file() and metrics.read_bytes().count(b"\n") >= after_rows

    running = launcher.start(lab.student(runs, **SETTINGS)).when(happened)
    time.sleep(delay)
    assert running.kill().code == -9


@pytest.mark.parametrize(
    "kills", [3, pytest.param(12, marks=pytest.mark.slow)], ids=lambda kills: f"{kills}-kills"
)
def test_a_run_killed_at_random_moments_ends_as_the_unbroken_one(
    kills: int, unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    chance, run = random.Random(kills), lab.run(tmp_path)
    rows = sorted(chance.sample(range(1, STEPS - 3), kills))
    for row in rows:
        kill_during_training(lab, launcher, tmp_path, row, chance.uniform(0, 0.03))
        whole = checkpoint.latest(run.folder / "checkpoints")
        assert whole is not None or row <= 4
    done = launcher.run(lab.student(tmp_path, **SETTINGS))
    assert done.code == 0 and "which died" in done.text
    assert run.losses == unbroken.losses
    assert run.weights == unbroken.weights
    assert not list((run.folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "deaths",
    [
        [(1, "before-dir"), (1, "after-file:optimizer.safetensors")],  # no checkpoint yet
        [(2, "before-manifest"), (2, "before-rename")],
        [(3, "after-rename"), (1, "during-prune")],
    ],
    ids=lambda deaths: "+".join(point.partition(":")[0] for _, point in deaths),
)
def test_a_run_that_dies_twice_inside_a_save_ends_as_the_unbroken_one(
    deaths: list[tuple[int, str]], unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, **SETTINGS)
    for fault in deaths:
        assert launcher.run(overrides, fault=fault).code == -9
    done = launcher.run(overrides)
    assert done.code == 0, done.text
    assert lab.run(tmp_path).losses == unbroken.losses
    assert lab.run(tmp_path).weights == unbroken.weights


@pytest.mark.parametrize(
    ("group", "field", "same"),
    [
        ("optimizer", "exp_avg", ()),
        ("ema", "", ("model.safetensors", "optimizer.safetensors")),  # it follows, and never leads
    ],
)
def test_a_resume_without_part_of_the_state_is_noticed(
    group: str,
    field: str,
    same: tuple[str, ...],
    unbroken: Any,
    lab: Any,
    launcher: Any,
    tmp_path: Path,
) -> None:
    overrides = lab.student(tmp_path, **SETTINGS)
    assert launcher.run(overrides, fault=(3, "after-rename")).code == -9
    folder, run = tmp_path / "student" / "checkpoints", lab.run(tmp_path)
    tensors, state = checkpoint.load(run.newest)
    for name, tensor in tensors[group].items():
        if name.endswith(field):
            tensor.zero_()
    checkpoint.save(folder, state["step"], tensors=tensors, state=state, keep=2)
    assert launcher.run(overrides).code == 0
    assert run.losses[:12] == unbroken.losses[:12]
    assert (run.losses == unbroken.losses) is bool(same)
    equal = [name for name, digest in run.weights.items() if digest == unbroken.weights[name]]
    assert equal == list(same)


@pytest.mark.slow
def test_a_whole_job_killed_once_at_each_of_ten_random_moments_ends_as_the_unbroken_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    def overrides(name: str) -> list[str]:
        data = {"data.dir": tmp_path / name / "data", "codec.path": lab.teacher / "codec"}
        return lab.overrides(tmp_path / name, {**lab.student_settings, **EVERYTHING, **data})

    start, chance = time.monotonic(), random.Random(0)
    assert launcher.run(overrides("unbroken")).code == 0
    duration = time.monotonic() - start
    for attempt in range(10):
        running = launcher.start(overrides(str(attempt)))
        time.sleep(chance.uniform(0, duration))
        killed = running.kill()
        assert launcher.run(overrides(str(attempt))).code == 0, killed.text
        broken, unbroken = (tmp_path / name / "student" for name in (str(attempt), "unbroken"))
        for seed_folder in ("", "repeats/seed-1"):
            mine, theirs = (lab.run(path, seed_folder) for path in (broken, unbroken))
            assert mine.losses == theirs.losses and mine.weights == theirs.weights
            assert [row[0] for row in mine.losses] == list(range(1, STEPS + 1))
        for name in EXPORTED:
            assert sha256(broken / "export" / name) == sha256(unbroken / "export" / name)
