"""What real training steps take on a GPU: no growth, no more than dense, and what was planned."""

import gc

import pytest
import torch

from gossamer.benchmarks.calibration import SETTINGS, calibrator
from gossamer.benchmarks.training_step import DENSE, Step, config
from gossamer.train.config import build
from gossamer.train.memory import estimate, estimate_calibration

pytestmark = pytest.mark.gpu

LATENT, TEXT = (16, 8, 64, 64), (512, 512)  # 8,192 tokens
SMALL = [
    "model.num_layers=4",
    "model.num_heads=8",
    "model.ffn_dim=4096",
    "model.text_dim=512",
    "sparsity=0.9",
    "policy.k=0.1",
]
SPARSE = ["teacher=cached", "noise_draws=1"]
METHODS = {
    "row_major": [],
    "centroid": ["compensation=centroid"],
    "tiles": ["layout=tiles", "layout.block=[4,4,4]", "compensation=centroid"],
    "clusters": ["layout=sorted_clusters"],
}


def peak(*settings: str) -> tuple[int, int, list[int]]:
    """Return the peak of steps 2 and 3, what was planned, and the bytes at each step's entry."""
    cfg = config(*SMALL, *settings)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    planned = estimate(cfg, LATENT, TEXT, dtype=torch.bfloat16, clips=1).total
    step, entries = Step(cfg, LATENT, TEXT, torch.device("cuda")), []
    for index in range(3):
        torch.cuda.synchronize()
        entries.append(torch.cuda.memory_allocated() - before)
        if index == 1:
            torch.cuda.reset_peak_memory_stats()
        step()
        step.marks.take()
    return torch.cuda.max_memory_allocated() - before, planned, entries


@pytest.mark.parametrize("recompute", ["true", "false"])
@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_step_takes_what_was_planned_and_no_more_than_a_dense_one(
    method: str, recompute: str
) -> None:
    checkpointing = f"gradient_checkpointing={recompute}"
    dense, dense_planned, _ = peak(*DENSE, checkpointing)
    sparse, sparse_planned, entries = peak(*METHODS[method], *SPARSE, checkpointing)
    assert entries[2] == entries[1], entries
    assert sparse < 1.05 * dense, (sparse, dense)
    assert abs(dense_planned / dense - 1) < 0.1, (dense_planned, dense)
    assert abs(sparse_planned / sparse - 1) < 0.1, (sparse_planned, sparse)


@pytest.mark.parametrize("settings", [["teacher=offloaded"], ["ema=0.9"], ["lora.rank=16"]])
def test_the_plan_holds_with_teachers_averages_and_adapters(settings: list[str]) -> None:
    if "lora.rank=16" in settings:
        pytest.importorskip("peft")
        settings = [*settings, "teacher=shared"]
    took, planned, _ = peak(*settings)
    assert abs(planned / took - 1) < 0.1, (planned, took)


@pytest.mark.parametrize("settings", [[], ["allocation=uniform"]], ids=["gradients", "none"])
def test_a_calibration_takes_what_was_planned(settings: list[str]) -> None:
    cfg = config(*SMALL, *SETTINGS, "calibration.noise_levels=[0.5]", *settings)
    planned = estimate_calibration(cfg, LATENT, TEXT, dtype=torch.bfloat16).total
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        one = calibrator(cfg, LATENT, TEXT, torch.device("cuda"))
        one.run(build(cfg.allocation), sparsity=0.9)
    took = torch.cuda.max_memory_allocated() - before
    assert abs(planned / took - 1) < 0.1, (planned, took)
