"""Keeping the policy's own budget: nothing is chosen, and what is measured is what will run."""

from typing import Any

import pytest
import torch
from torch import nn

from gossamer.sparse.attach import attach, attentions, method_from_spec
from gossamer.train.calibrate import Sample
from gossamer.train.evaluate import measure_masks
from gossamer.train.keep_policy import keep_policy
from gossamer.train.model import ScratchWan

SPEC: dict[str, Any] = {
    "layout": {"_target_": "gossamer.sparse.layout.RowMajor", "q_block": 8, "kv_block": 4},
    "estimator": {"_target_": "gossamer.sparse.estimators.mean_pool.MeanPool"},
    "policy": {"_target_": "gossamer.sparse.policies.Hybrid", "k": 0.2, "p": 0.4},
    "compensation": {"_target_": "gossamer.sparse.compensation.Drop"},
    "backend": "reference",
}
LEVELS = [0.8, 0.2]


def teacher() -> nn.Module:
    source = ScratchWan(num_layers=1, num_heads=3, head_dim=16, ffn_dim=32, channels=4, text_dim=8)
    model = source.load(seed=0).eval().requires_grad_(False)
    attention = model.blocks[0].attn1
    for layer in (attention.to_q, attention.to_k):  # sharper than random weights give
        layer.weight.data *= 20
    return model


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for level, t in enumerate(LEVELS):
        x = torch.randn(2, 4, 3, 8, 8, generator=generator)
        text = torch.randn(2, 5, 8, generator=generator)
        made.append(Sample(level, x, torch.full((2,), t), text, None))
    return made


def test_the_first_layer_is_measured_as_the_sparse_model_runs_it() -> None:
    dense = attach(teacher(), None)
    found = keep_policy(
        dense, method_from_spec(SPEC), samples(), sparsity=0.5, noise_levels=LEVELS, clips=2
    )
    sparse = attach(teacher(), method_from_spec(SPEC))
    found.apply(sparse)
    measured = measure_masks(sparse, samples())
    recall = measured.recall["blocks.0.attn1"]
    assert found.planned_density == pytest.approx(measured.mean_density, rel=1e-6)
    assert 0.2 < found.planned_density < 0.9
    assert torch.tensor(found.captured_mass)[0].mean(1).tolist() == pytest.approx(recall.tolist())


def test_every_head_keeps_the_policys_k_and_p_and_no_hook_stays() -> None:
    dense = attach(teacher(), None)
    found = keep_policy(
        dense, method_from_spec(SPEC), samples(), sparsity=0.5, noise_levels=LEVELS, clips=2
    )
    assert found.k == [pytest.approx([0.2] * 3)] and found.p == [pytest.approx([0.4] * 3)]
    assert (found.target_density, found.curve_error, found.clips) == (0.5, [], 2)
    assert not attentions(dense)["blocks.0.attn1"]._forward_pre_hooks
