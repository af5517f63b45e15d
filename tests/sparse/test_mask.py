"""Text is always exact: one rule, for masks, for what they cost and for what may learn."""

from itertools import pairwise

import pytest
import torch

from gossamer.sparse.allocation import coverage
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.gates import find_band
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.sparse.mask import keep_text, text_pairs
from gossamer.sparse.policies import Hybrid

GRID = TokenGrid(2, 4, 4, text_before=5, text_after=3)
LAYOUTS = {
    "runs": RowMajor(q_block=8, kv_block=4),
    "boxes": Tiles(block=(1, 2, 2)),
    "clusters": SemanticClusters(num_q=4, num_kv=6),
}


def scored(layout, grid):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, grid.num_tokens, 8, generator=generator)
    parts = layout(q, k, v, grid)
    return MeanPool()(parts[0].permute(q), parts[1].permute(k), parts[1].permute(v), *parts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_costs_and_gates_agree_with_a_count_over_tokens(name):
    scores = scored(LAYOUTS[name], GRID)
    pairs = text_pairs(scores.q_layout, scores.kv_layout)
    is_text = GRID.is_text()[None, None, :, None].expand(1, 2, -1, -1).float()
    text_of = [
        (layout.permute(is_text)[0, 0, :, 0], layout.offsets.expand(1, 2, -1)[0, 0].tolist())
        for layout in (scores.q_layout, scores.kv_layout)
    ]
    q_text, kv_text = (
        [bool(tokens[a:b].any()) for a, b in pairwise(edges)] for tokens, edges in text_of
    )
    assert any(q_text) and not all(q_text)
    assert pairs.tolist() == [[q or kv for kv in kv_text] for q in q_text]

    chosen = Hybrid(k=0.3)(scores)
    mask = keep_text(chosen)
    assert torch.equal(mask.selected, chosen.selected | pairs)
    band = find_band(scores, chosen, 3)
    row = torch.arange(len(q_text))[:, None]
    assert not (band.valid & pairs[row, band.column]).any()
    assert band.valid.any()
    covered = coverage(scores)[1]
    blocks = round(0.3 * len(kv_text))
    sizes = scores.q_layout.sizes.double()
    expected = (covered[..., blocks - 1] * sizes).sum(-1) / sizes.sum(-1)
    torch.testing.assert_close(expected, mask.density)


def test_without_text_there_is_nothing_to_keep():
    scores = scored(LAYOUTS["runs"], TokenGrid(2, 4, 4))
    assert text_pairs(scores.q_layout, scores.kv_layout) is None
    chosen = Hybrid(k=0.3)(scores)
    assert keep_text(chosen) is chosen
