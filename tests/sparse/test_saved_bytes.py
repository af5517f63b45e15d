"""What a sparse layer keeps for its backward, beside dense attention's q, k, v, out and lse."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.layouts.clusters import SortedClusters
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(21, 30, 52)  # Wan at 480p, 81 frames: 32,760 tokens
HEADS, DIM = 12, 128
HIDDEN = GRID.num_tokens * HEADS * DIM * 2  # bytes of q, and of what checkpointing keeps of a block
DENSE = 4 * HIDDEN + GRID.num_tokens * HEADS * 4  # q, k, v, out and lse


def method(layout: Any, compensation: Any) -> SparseMethod:
    return SparseMethod(layout, MeanPool(), Hybrid(k=0.05), compensation)


def run(layer: nn.Module) -> tuple[int, Tensor]:
    """Return the bytes of all storages that autograd saves in a forward, and the output.

    Tensors are on the meta device, laid out as Wan's projections lay them out.
    """
    shape = (1, GRID.num_tokens, HEADS, DIM)
    leaves = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(3)
    ]
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = layer(q, k, v, GRID, torch.empty(1, device="meta"))
    return sum(storage.nbytes() for storage in saved.values()), out


def kept(layer: SparseAttention) -> Iterator[Tensor]:
    """Yield the tensors that the layer holds after a forward, as its mask and band."""
    for record in (layer.mask, layer.band):
        for value in vars(record).values() if record is not None else ():
            if isinstance(value, Tensor):
                yield value


@pytest.mark.parametrize(
    ("layout", "compensation"),
    [
        (RowMajor(q_block=128, kv_block=64), Drop()),
        (RowMajor(q_block=128, kv_block=64), Centroid()),
        (SortedClusters(q_block=128, kv_block=64), Drop()),
        (Tiles(block=(4, 4, 8)), Centroid()),
    ],
    ids=["row_major", "centroid", "clusters", "tiles"],
)
def test_a_sparse_layer_saves_at_most_5_percent_more_than_a_dense_one(
    layout: Any, compensation: Any
) -> None:
    layer = SparseAttention(method(layout, compensation), HEADS, DIM).to("meta")
    saved, out = run(layer)
    assert out.shape == (1, HEADS, GRID.num_tokens, DIM)
    assert DENSE < saved < 1.05 * DENSE, saved / DENSE


def test_the_count_sees_what_is_saved() -> None:
    class Wasteful(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
            return q * k * v

    assert run(Wasteful())[0] == 4 * HIDDEN  # q, k, q * k and v


def test_between_forward_and_recompute_a_layer_keeps_its_mask_but_no_lists() -> None:
    layer = SparseAttention(method(RowMajor(), Drop()), HEADS, DIM).to("meta")
    run(layer)
    assert layer.mask is not None
    pairs = layer.mask.selected.numel()
    assert sum(x.numel() * x.element_size() for x in kept(layer)) == pairs  # a byte each
    assert pairs < 0.05 * HIDDEN
    first = layer.mask
    run(layer)
    assert layer.mask is first  # the recompute takes it


def test_the_lists_of_a_mask_are_made_anew_and_equal() -> None:
    layer = SparseAttention(method(RowMajor(q_block=8, kv_block=8), Drop()), 2, 16)
    grid = TokenGrid(2, 4, 8)
    torch.manual_seed(0)
    layer(*torch.randn(3, 1, 2, grid.num_tokens, 16), grid, torch.zeros(1))
    assert layer.mask is not None
    one, other = layer.mask.blocks, layer.mask.blocks
    assert one is not other
    assert torch.equal(one.kv_indices, other.kv_indices)
    assert torch.equal(one.q_indices, other.q_indices)
