"""The study of published methods: one line each, at the density asked for, on a stock model."""

import argparse

import pytest
import torch

from gossamer.sparse.methods import NAMES
from gossamer.train.allocation_study import _published, _table
from gossamer.train.evaluate import velocities
from gossamer.train.measures import Sample

diffusers = pytest.importorskip("diffusers")


def test_every_method_is_measured_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    x = torch.randn(1, 4, 4, 16, 16)
    sample = Sample(0, x, torch.tensor([0.5]), torch.randn(1, 7, 16), None, x)
    target = velocities(model, [sample], "teacher")
    options = argparse.Namespace(sparsity=[0.0, 0.75], block=[16, 8], arms=NAMES, methods=True)
    found = list(_published(model, [sample], target, options))
    assert [(name, s) for name, s, *_ in found] == [(n, s) for n in NAMES for s in (0.0, 0.75)]
    for _, sparsity, error, density in found:
        assert abs(density - (1 - sparsity)) < 0.02
        assert error < 1e-5 if sparsity == 0 else error > 1e-4
    assert torch.equal(velocities(model, [sample], "again")[0], target[0])
    table = _table({(n, s): [(e, d)] for n, s, e, d in found}, options)
    assert table[0].startswith("| method |") and len(table) == 2 + len(NAMES)
