"""One of two processes that share each clip: outputs and gradients are those of one, fp32.

Every method with numbers of its own for each head, each head with other numbers; run by
test_parallel.py.
"""

from copy import deepcopy

import torch
import torch.distributed as dist
from tiny import tiny_wan
from torch import Tensor, nn

from gossamer.sparse.attach import attach, attentions, share_sequence
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid, Drop, GatedCentroid, Linear
from gossamer.sparse.estimators.head_pattern import HeadPattern
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.router import Router
from gossamer.sparse.layout import RowMajor, Tiles
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.sparse.layouts.head_pattern import HeadPattern as HeadPatternLayout
from gossamer.sparse.layouts.per_head import PerHead
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.sequence import SequenceParallel

HEADS = 4
TILES = Tiles(block=(1, 2, 2))
ORDERS = PerHead(q_block=8, kv_block=4, tile=(1, 2, 2))
BANDS = HeadPatternLayout(q_block=8, kv_block=4)
METHODS: dict[str, SparseMethod | None] = {
    "dense": None,
    "budgets": SparseMethod(TILES, MeanPool(), Hybrid(k=0.3), Drop()),
    "trained budgets": SparseMethod(TILES, MeanPool(), TrainedHybrid(k=0.3), Centroid()),
    "router, gate": SparseMethod(TILES, Router(side=2), TrainedHybrid(k=0.3), GatedCentroid()),
    "linear": SparseMethod(RowMajor(q_block=8, kv_block=4), MeanPool(), Hybrid(k=0.3), Linear()),
    "orders": SparseMethod(ORDERS, MeanPool(), Hybrid(k=0.3), Centroid()),
    "bands": SparseMethod(BANDS, HeadPattern(), Hybrid(k=0.3), Drop()),
    "clusters": SparseMethod(
        SemanticClusters(num_q=4, num_kv=8), MeanPool(), Hybrid(k=0.3), Centroid()
    ),
}


def wan(method: SparseMethod | None) -> nn.Module:
    """Return a tiny Wan whose heads all have their own budgets, orders, gates and matrices."""
    model = tiny_wan(num_attention_heads=HEADS, attention_head_dim=12)
    attach(model.train(), method)
    for attention in attentions(model).values():
        for name, tensor in attention.state_dict().items():
            if name.endswith((".k", ".p")):
                tensor.copy_(torch.linspace(0.1, 0.6, HEADS))
            elif name.endswith("choice"):
                tensor.copy_(torch.arange(HEADS) % len(ORDERS.names))
            else:
                tensor.normal_(std=0.1)
    return model


def gradients(model: nn.Module, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(**call, return_dict=False)[0]
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def selected(model: nn.Module) -> list[Tensor]:
    masks = [getattr(attention, "mask", None) for attention in attentions(model).values()]
    return [mask.selected for mask in masks if mask is not None]


def check(name: str, sequence: SequenceParallel) -> None:
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([900.0, 30.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator),
    }
    model = wan(METHODS[name])
    shared = deepcopy(model)
    expected, single = gradients(model, call)
    share_sequence(shared, sequence)
    out, own = gradients(shared, call)
    assert (out - expected).abs().max() < 1e-6 * expected.abs().max(), name
    assert own.keys() == single.keys(), name
    for parameter, gradient in own.items():
        dist.all_reduce(gradient)
        difference = (gradient / sequence.size - single[parameter]).norm()
        assert difference <= 1e-5 * single[parameter].norm(), (name, parameter, difference)
    for mine, whole in zip(selected(shared), selected(model), strict=True):
        assert torch.equal(mine, whole[:, sequence.heads(HEADS)]), name


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sequence = SequenceParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    for name in METHODS:
        check(name, sequence)
    dist.destroy_process_group()
    print("all agree")  # noqa: T201


if __name__ == "__main__":
    main()
