"""Drop with SpargeAttention's second filter: what it refuses."""

import pytest
import torch

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.policies import Hybrid


def test_filtered_drop_refuses_training_and_a_limit_above_zero():
    grid = TokenGrid(2, 4, 8)
    parts = RowMajor(q_block=16, kv_block=16), MeanPool(), Hybrid(k=0.5), FilteredDrop()
    part = SparseAttention(SparseMethod(*parts), 2)
    q, k, v = torch.randn(3, 1, 2, grid.num_tokens, 8)
    with pytest.raises(ValueError, match="filtered_drop: allowed is inference"):
        part(q.requires_grad_(), k, v, grid, torch.ones(1))
    with pytest.raises(ValueError, match=r"skip_below=.*allowed is at most 0"):
        FilteredDrop(skip_below=1.0)
    assert part.state_dict()["compensation.skip_below"].tolist() == [-10.0, -10.0]
