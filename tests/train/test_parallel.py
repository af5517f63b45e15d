"""Shards (FSDP2, HSDP) and shared tokens (Ulysses) in processes on the CPU: the run of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.multi

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
HSDP = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
# all that has numbers of its own for each head: budgets, router, gate
MASKS = {
    "policy": "trained_hybrid",
    "estimator": "router",
    "compensation": "gated_centroid",
    "layout__block": [1, 1, 2],
    "sparsity": 0.625,
    "ema": 0.5,
}


@pytest.fixture(scope="module")
def alone(lab: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run in one process."""
    runs = tmp_path_factory.mktemp("alone")
    done = launcher.run(lab.student(runs, **MASKS))
    assert done.code == 0, done.text
    return lab.run(runs)


def assert_same(run: Any, alone: Any) -> None:
    """Require the metrics within 1e-5 of each other, and close tensors in every file."""
    mine, theirs = np.array(run.losses), np.array(alone.losses)
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=0)
    for file in ("model", "ema", "optimizer"):
        ours, single = (load_file(r.newest / f"{file}.safetensors") for r in (run, alone))
        assert ours.keys() == single.keys()
        for name in ours:
            assert ours[name].shape == single[name].shape
            assert float((ours[name] - single[name]).abs().max()) < 1e-4, name


@pytest.mark.parametrize("sequence", [1, 2])
@pytest.mark.parametrize("launch", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(
    launch: dict[str, str],
    sequence: int,
    alone: Any,
    lab: Any,
    launcher: Any,
    tmp_path: Path,
) -> None:
    overrides = lab.student(tmp_path, sequence_parallel=sequence, **MASKS)
    done = launcher.ranks(overrides, launch=launch)
    assert [one.code for one in done] == [0, 0], done[0].text + done[1].text
    assert_same(lab.run(tmp_path), alone)
