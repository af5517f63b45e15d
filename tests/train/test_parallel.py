"""Shards (FSDP2, HSDP) and shared tokens (Ulysses) in processes on the CPU: the run of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from gossamer.train import checkpoint

pytestmark = pytest.mark.multi

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
HSDP = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
# all that has numbers of its own for each head: budgets, router, gate; and averaged weights
SETTINGS = {
    "policy": "trained_hybrid",
    "estimator": "router",
    "compensation": "gated_centroid",
    "layout__block": [1, 1, 2],
    "sparsity": 0.625,
    "ema": 0.5,
    "calibration__path": None,
}


def assert_same(run: Any, unbroken: Any, rtol: float = 1e-5) -> None:
    """Require the metrics within rtol of each other, and close tensors in every file."""
    mine, theirs = np.array(run.losses), np.array(unbroken.losses)
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=0)
    mine, theirs = (checkpoint.load(r.newest)[0] for r in (run, unbroken))
    for group in ("model", "ema", "optimizer"):
        ours, single = mine[group], theirs[group]
        assert ours.keys() == single.keys()
        for name in ours:
            assert ours[name].shape == single[name].shape
            assert float((ours[name] - single[name]).abs().max()) < 1e-4, name


def assert_shared_out(path: Path, writers: int) -> None:
    """Require a file of each writer for each group, none with the whole of a shared matrix."""
    files = sorted(file.name for file in path.glob("model-*"))
    ends = [f"-0000{n + 1}-of-0000{writers}.safetensors" for n in range(writers)]
    assert files == [f"model{end}" for end in ends]
    assert len(list(path.glob("*.safetensors"))) == 3 * writers
    whole = checkpoint.load(path)[0]
    for group in ("model", "ema", "optimizer"):
        shares = [load_file(path / f"{group}{end}") for end in ends]
        shared = {name for share in shares[1:] for name in share}
        assert [name for name in shared if ".to_q." in name] and shared <= shares[0].keys()
        for name in shared:
            rows = [len(share[name]) for share in shares if name in share]
            total = len(whole[group][name])
            assert sum(rows) == total and max(rows) == -(-total // writers) < total
        matrices = {n for n, t in whole[group].items() if t.ndim == 2 and n.endswith(".weight")}
        assert matrices <= shared


@pytest.mark.parametrize("script", ["sequence_ranks.py", "sharded_ranks.py"])
def test_two_processes_agree_with_one_in_every_gradient(script: str, launcher: Any) -> None:
    done = launcher.ranks([str(Path(__file__).with_name(script))])
    assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
    assert "all agree" in done[0].text


def test_shards_give_the_run_of_one_and_are_exported(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    stages = ["calibrate", "train", "export"]
    done = launcher.ranks(lab.student(tmp_path, **SETTINGS, stages=stages), launch=FSDP)
    assert [one.code for one in done] == [0, 0], done[0].text
    assert "velocities equal the trained student's bit for bit" in done[0].text
    assert_same(lab.run(tmp_path), unbroken)


@pytest.mark.full
def test_compiled_shards_of_student_and_teacher_give_the_compiled_run_of_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "compile": True, "gradient_checkpointing": True}
    alone = launcher.run(lab.student(tmp_path, name="alone", **settings))
    assert alone.code == 0, alone.text
    done = launcher.ranks(lab.student(tmp_path, **settings), launch=FSDP)
    assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
    assert_same(lab.run(tmp_path), lab.run(tmp_path, "alone"))


def test_processes_that_share_each_clip_give_the_run_of_one(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "sequence_parallel": 2, "gradient_checkpointing": True}
    done = launcher.ranks(lab.student(tmp_path, **settings))
    assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
    assert_same(lab.run(tmp_path), unbroken)


def test_steps_that_are_not_finite_are_left_out_of_shards_in_bf16(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {"steps": 20, "optimizer__lr": 1e9, "max_skipped": 1}
    launch = {**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}
    done = launcher.ranks(lab.student(tmp_path, **settings), launch=launch)
    assert [one.code for one in done] == [2, 2], done[0].text + done[1].text
    assert "Traceback" not in done[0].text and "left out in all processes" in done[0].text
    assert "steps=2 of the last 100 left out" in done[0].errors[0]


def test_a_sharded_run_goes_on_in_one_process_in_three_and_in_two(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    # Parts of 12, 6 and 4 clips, whose products the CPU rounds otherwise: 5e-5 of the metrics over
    # the instruction sets of one processor. Masks have the rate of the weights, since AdamW makes
    # steps of 0.1 of that rounding at a hundred times it.
    settings = {**SETTINGS, "checkpoint_every": 2, "batch_size": 12, "optimizer__mask_numbers": 1.0}
    alone, runs = tmp_path / "alone", tmp_path / "shared"
    assert launcher.run(lab.student(alone, **settings)).code == 0
    overrides, fault = lab.student(runs, **settings), (1, "after-rename")
    killed, left = launcher.ranks(overrides, launch=FSDP, fault=fault)
    assert killed.code == -9 and left.code != 0
    assert_shared_out(lab.run(runs).newest, 2)
    killed = launcher.run(overrides, fault=fault)
    assert killed.code == -9 and "at step 2 of 8" in killed.text
    killed, *others = launcher.ranks(overrides, launch=FSDP, processes=3, fault=fault)
    assert killed.code == -9 and all(one.code for one in others), killed.text
    assert "at step 4 of 8" in killed.text
    assert_shared_out(lab.run(runs).newest, 3)
    done = launcher.ranks(overrides, launch=FSDP)
    assert [one.code for one in done] == [0, 0] and "at step 6 of 8" in done[0].text
    assert_same(lab.run(runs), lab.run(alone), rtol=1e-4)


def test_adapters_and_a_shared_teacher_in_shards_give_the_run_of_one(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    lora = {"lora__rank": 4, "teacher": "shared", "ema": 0.5}
    one, two = tmp_path / "one", tmp_path / "two"
    assert launcher.run(lab.student(one, **lora)).code == 0
    done = launcher.ranks(lab.student(two, **lora), launch=FSDP)
    assert [one.code for one in done] == [0, 0], done[0].text
    assert_same(lab.run(two), lab.run(one))


@pytest.mark.full
def test_two_copies_of_two_shards_that_share_clips_give_the_run_of_one(
    unbroken: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, sequence_parallel=2, **SETTINGS)
    done = launcher.ranks(overrides, launch=HSDP, processes=4)
    assert [one.code for one in done] == [0] * 4, done[0].text
    assert_same(lab.run(tmp_path), unbroken)
    assert_shared_out(lab.run(tmp_path).newest, 2)


def test_a_launch_that_is_refused_ends_all_processes_before_any_work(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    done = launcher.ranks(lab.student(tmp_path), launch={**FSDP, "FSDP_VERSION": "1"})
    assert [one.code for one in done] == [2, 2]
    said = "fsdp_version=1: allowed is 2; add --fsdp_version 2"
    assert said in done[0].errors[0] and "Traceback" not in done[0].text
    assert not any(tmp_path.iterdir())
