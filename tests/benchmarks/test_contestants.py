"""Every contestant is told apart by its name, and FlexAttention gets the very same lists."""

import pytest
import torch

from gossamer.benchmarks.cases import Case, layouts, random_mask
from gossamer.benchmarks.contestants import CONTESTANTS, flex_mask
from gossamer.kernels.block_sparse_attention.op import BACKENDS


def test_every_backend_competes_but_the_reference() -> None:
    for backend in set(BACKENDS) - {"reference"}:
        assert {backend, f"{backend}+centroid"} <= set(CONTESTANTS)
    assert not any("reference" in name for name in CONTESTANTS)
    assert list(CONTESTANTS)[-1] == "flex"
    assert [name for name, one in CONTESTANTS.items() if one.is_dense] == [
        "dense-cudnn",
        "dense-flash",
    ]


@pytest.mark.parametrize("block", [(16, 8), (8, 16)], ids=str)
def test_flex_attention_gets_the_same_selection_and_its_transpose(block: tuple[int, int]) -> None:
    case = Case(block, 0.7, "skewed")
    mask = random_mask(case, 2, *layouts(100, block, torch.device("cpu")))
    flex = flex_mask(mask, 100)
    assert torch.equal(flex.to_dense().bool(), mask.selected)
    assert flex.seq_lengths == (100, 100) and block == flex.BLOCK_SIZE
    assert torch.equal(flex.full_q_num_blocks, mask.blocks.q_num_blocks)
    used = torch.arange(flex.full_q_indices.shape[-1]) < flex.full_q_num_blocks[..., None]
    assert torch.equal(flex.full_q_indices[used], mask.blocks.q_indices[used])
