"""The trainer on two GPUs, through `accelerate launch` and NCCL: the run of one GPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

# all that has numbers of its own for each head, averages, and a rate that no number of steps sets
SETTINGS = {
    "device": "cuda",
    "backend": "reference",
    "policy": "trained_hybrid",
    "compensation": "gated_centroid",
    "layout__block": [1, 1, 2],
    "sparsity": 0.625,
    "ema": 0.5,
    "optimizer__warmup": 0,
    "optimizer__final_lr": 1,
    "checkpoint_every": 2,
    "resume": "force",
    "calibration__path": None,
}
FSDP = ["--use_fsdp", "--fsdp_version", "2"]


def start(
    overrides: list[str], folder: Path, *flags: str, processes: int = 2
) -> subprocess.Popen[str]:
    """Start `accelerate launch` of a job; what it says goes to folder/log."""
    flags = (*flags, "--main_process_port", "0") if processes > 1 else flags
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--dynamo_backend", "no"]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [*command, "-m", "gossamer.train", *overrides],
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
            # some of cuDNN's convolutions would take TF32: 1e-3 between batches of two sizes
            env={**os.environ, "OMP_NUM_THREADS": "2", "NVIDIA_TF32_OVERRIDE": "0"},
        )


def run(overrides: list[str], folder: Path, *flags: str, processes: int = 2) -> None:
    done = start(overrides, folder, *flags, processes=processes).wait(180)
    assert done == 0, (folder / "log").read_text()[-3000:]


def test_shards_one_gpu_and_shared_clips_go_on_with_each_others_run(
    lab: Any, tmp_path: Path
) -> None:
    one, parts, turns = (tmp_path / name for name in ("one", "parts", "turns"))
    one.mkdir(), parts.mkdir(), turns.mkdir()
    run(lab.student(one, **SETTINGS, steps=6), one, processes=1)
    run(lab.student(parts, **SETTINGS, steps=6, grad_accumulation=2), parts, processes=1)
    run(lab.student(turns, **SETTINGS, steps=2), turns, *FSDP)
    run(lab.student(turns, **SETTINGS, steps=4), turns, processes=1)
    run(lab.student(turns, **SETTINGS, steps=6, sequence_parallel=2), turns, "--multi_gpu")
    mine, split, alone = (np.array(lab.run(folder).losses) for folder in (turns, parts, one))
    assert mine.shape == alone.shape == (6, 4)
    rounding = np.abs(split / alone - 1).max()  # of clips in twos on one GPU: the yardstick
    assert rounding < 1e-3
    np.testing.assert_allclose(mine, alone, rtol=max(4 * rounding, 1e-4))


def test_the_other_process_ends_when_one_is_killed(lab: Any, tmp_path: Path) -> None:
    job = start(lab.student(tmp_path, **SETTINGS, steps=100_000), tmp_path, *FSDP)
    metrics = lab.run(tmp_path).folder / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end and job.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(60) != 0
    assert time.monotonic() - killed < 60
