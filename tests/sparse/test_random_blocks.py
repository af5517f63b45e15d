"""Random blocks: the same for every input, evenly spread, others for another seed and head."""

import pytest
import torch

from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.estimators.random_blocks import RandomBlocks
from gossamer.sparse.layout import RowMajor, TokenGrid
from gossamer.sparse.mask import BlockScores
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.sequence import only_heads


def scores(seed: int = 0, fill: float = 0.0, batch: int = 1) -> BlockScores:
    x = torch.full((batch, 3, 1024, 8), fill)
    layouts = RowMajor(q_block=16, kv_block=16)(x, x, x, TokenGrid(4, 16, 16))
    return RandomBlocks(seed=seed)(x, x, x, *layouts)


def test_scores_do_not_depend_on_the_input_and_each_row_sums_to_one() -> None:
    first, second = scores(fill=0.0).score, scores(fill=3.0, batch=2).score
    assert torch.equal(first.expand_as(second), second)
    torch.testing.assert_close(first.sum(-1), torch.ones(1, 3, 64))


def test_heads_rows_and_seeds_differ_and_no_block_is_preferred() -> None:
    found = [Hybrid(k=0.25)(scores(seed)).selected[0] for seed in range(40)]  # [H, 64, 64]
    chosen = torch.stack(found).double()
    assert (chosen.mean(-1) == 0.25).all()
    # each block is chosen by chance: its share over seeds has the spread of 40 draws of 1 in 4
    share = chosen.mean(0)
    assert abs(float(share.std()) - (0.25 * 0.75 / 40) ** 0.5) < 0.005
    agree = (chosen[:, 0] * chosen[:, 1]).mean()  # two heads
    assert abs(float(agree) - 1 / 16) < 0.005
    agree = (chosen[:-1] * chosen[1:]).mean()  # two seeds
    assert abs(float(agree) - 1 / 16) < 0.005
    agree = (chosen[:, :, :-1] * chosen[:, :, 1:]).mean()  # two rows
    assert abs(float(agree) - 1 / 16) < 0.005


def test_processes_that_share_the_heads_choose_what_one_does() -> None:
    method = SparseMethod(RowMajor(q_block=16, kv_block=16), RandomBlocks(), Hybrid(k=0.25), Drop())
    x, grid, time = torch.randn(3, 1, 4, 256, 8), TokenGrid(1, 16, 16), torch.ones(1)
    whole, shared = (SparseAttention(method, num_heads=4) for _ in range(2))
    whole(*x, grid, time)
    own = slice(2, 4)  # the second process's
    with only_heads(shared, own, 4):
        shared(*(t[:, own] for t in x), grid, time)
    assert torch.equal(shared.mask.selected, whole.mask.selected[:, own])
    assert "estimator.head" not in shared.state_dict()


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1: allowed is a whole number of at least 0"):
        RandomBlocks(seed=-1)
