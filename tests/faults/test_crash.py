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


def assert_same(run: Any, unbroken: Any) -> None:
    """Require equal losses, learning rates, gradient norms and bits of all tensors."""
    assert run.losses == unbroken.losses
    assert run.weights == unbroken.weights
    assert not list((run.folder / "checkpoints").glob(".*"))


@pytest.mark.case("F1")
def test_a_run_killed_at_a_random_moment_ends_as_the_unbroken_one(
    rounds: Any, unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    chance = random.Random(1)
    for number in rounds(2, 50):
        runs = tmp_path / str(number)
        row = chance.randrange(STEPS - 3)
        kill_during_training(lab, launcher, runs, row, chance.uniform(0, 0.03))
        done = launcher.run(lab.student(runs, **SETTINGS))
        assert done.code == 0 and "which died" in done.text
        assert_same(lab.run(runs), unbroken)


@pytest.mark.case("F7")
def test_a_run_killed_two_and_five_times_ends_as_the_unbroken_one(
    rounds: Any, unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    chance = random.Random(7)
    for number in rounds(1, 10):
        runs = tmp_path / str(number)
        for row in sorted(chance.sample(range(1, STEPS - 3), 2 if number % 2 else 5)):
            kill_during_training(lab, launcher, runs, row, chance.uniform(0, 0.03))
            assert checkpoint.latest(runs / "student" / "checkpoints") is not None or row <= 4
        assert launcher.run(lab.student(runs, **SETTINGS)).code == 0
        assert_same(lab.run(runs), unbroken)


@pytest.mark.case("F2")
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
    assert_same(lab.run(tmp_path), unbroken)


@pytest.mark.case("F5", control=True)
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


@pytest.mark.case("F5", control=True)
@pytest.mark.parametrize("broken", ["schedule", "samples", "noise"])
def test_a_resume_that_forgets_where_it_was_is_noticed(
    broken: str, unbroken: Any, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, **SETTINGS)
    assert launcher.run(overrides, fault=(3, "after-rename")).code == -9
    assert launcher.run(overrides, inject=injection(f"{broken}_from_zero")).code == 0
    with pytest.raises(AssertionError):
        assert_same(lab.run(tmp_path), unbroken)


@pytest.mark.slow
@pytest.mark.case("F1")
def test_a_whole_job_killed_once_at_each_of_ten_random_moments_ends_as_the_unbroken_one(
    rounds: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    often = list(rounds(0, 10))
    if not often:
        pytest.skip("in full counts only")

    def overrides(name: str) -> list[str]:
        data = {"data.dir": tmp_path / name / "data", "codec.path": lab.teacher / "codec"}
        return lab.overrides(tmp_path / name, {**lab.student_settings, **EVERYTHING, **data})

    start, chance = time.monotonic(), random.Random(0)
    assert launcher.run(overrides("unbroken")).code == 0
    duration = time.monotonic() - start
    for attempt in often:
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
