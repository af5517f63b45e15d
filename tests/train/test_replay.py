"""Blocks run again one at a time: gradients of the whole graph, in the memory of one block's."""

from typing import Any

import pytest
import torch
from tiny import tiny_wan
from torch import Tensor, nn

from gossamer.sparse.attach import attach, attentions
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor
from gossamer.sparse.policies import Hybrid
from gossamer.train.live_bytes import LiveBytes
from gossamer.train.measures import Measure, Sample, Seen, visit_layers
from gossamer.train.model import velocity
from gossamer.train.replay import blocks_kept, hooked, replay

WIDTH, TOKENS = 32, 64
MASK_PARAMETERS = 2 * 512  # of a layer: k and p


def wan(layers: int = 3) -> nn.Module:
    return attach(tiny_wan(num_layers=layers, ffn_dim=64), None).requires_grad_(False).eval()


def sample() -> Sample:
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, 4, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 5, 16, generator=generator)
    return Sample(0, x, torch.tensor([0.9, 0.2]), text, None, target)


def of_one_graph(model: nn.Module, given: Sample, weights: list[Tensor]) -> list[Any]:
    """Return the gradients of (weight * velocity) by each attention's output, for each weight."""
    outs: list[Tensor] = []
    with hooked(attentions(model).values(), lambda module, args, out: outs.append(out)):
        v = velocity(model, given.x.requires_grad_(), given.t, given.text, None)
    return [torch.autograd.grad((w * v).sum(), outs, retain_graph=True) for w in weights]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gradients_are_bit_for_bit_those_of_one_graph(autocast: bool, one_thread: None) -> None:
    model, given = wan(), sample()
    weights = [torch.randn(given.x.shape) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = of_one_graph(model, given, weights)
        with blocks_kept(model) as calls:
            v = velocity(model, given.x, given.t, given.text, None)
        last = calls[-1].out
        gradients = [
            torch.autograd.grad((w * v).sum(), last, retain_graph=True)[0] for w in weights
        ]
        for index, attention in reversed(list(enumerate(attentions(model).values()))):
            _, own, gradients = replay(calls[index], attention, gradients)
            for mine, whole in zip(own, expected, strict=True):
                assert torch.equal(mine, whole[index])
    assert not model.gradient_checkpointing
    assert all(not module._forward_hooks for module in attentions(model).values())


def peak(layers: int, measure: Measure) -> int:
    """Return the most bytes that a pass holds beside the weights."""
    model, given, live = wan(layers), sample(), LiveBytes("cpu")
    method = SparseMethod(RowMajor(q_block=8, kv_block=8), MeanPool(), Hybrid(k=0.5), Drop())
    sparse = [SparseAttention(method, 2, 16) for _ in range(layers)]
    visited: list[int] = []

    def visit(seen: Seen) -> None:
        visited.append(seen.index)
        for _ in range(2):
            layer = seen.under(sparse[seen.index])
            layer.error(layer.mask(layer.attention.policy))

    for parameter in model.parameters():
        live.count(parameter, "weights")
    with live:
        probes = [torch.randn_like(given.x) for _ in range(3)]
        visit_layers(model, given, visit, measure=measure, probes=probes)
    assert sorted(visited) == list(range(layers))
    return live.peak["activations"]


@pytest.mark.parametrize("measure", ["velocity", "fisher", "velocity_exact"])
def test_each_layer_adds_no_more_than_its_blocks_input(measure: Measure) -> None:
    block_input = 2 * TOKENS * WIDTH * 4
    assert peak(5, measure) - peak(2, measure) <= 3 * (block_input + MASK_PARAMETERS)


def test_a_pass_without_gradients_holds_one_layer() -> None:
    assert peak(5, "output") - peak(2, "output") <= 3 * MASK_PARAMETERS
