"""What holds for every layout with every estimator and policy, trained ones among them.

Run as a script it prints a hash of each row's mask for the samples of its rank, over all ranks.
"""

import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gossamer.kernels.blocks import block_of_token
from gossamer.sparse.attention import SparseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.head_pattern import HeadPattern as Band
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.estimators.router import Router
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.layouts.clusters import SemanticClusters, SortedClusters
from gossamer.sparse.layouts.head_pattern import HeadPattern
from gossamer.sparse.layouts.per_head import ORDERS, PerHead
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.token_share import TokenHybrid

GRID, TEXT, ONE = TokenGrid(4, 4, 6), TokenGrid(3, 4, 5, 3, 9), TokenGrid(1, 1, 1)
HEADS, DIM = 3, 8
LAYOUTS = {
    "row_major": RowMajor(q_block=16, kv_block=7),
    "tiles": Tiles(block=(2, 2, 4)),
    "per_head": PerHead(names=ORDERS, tile=(2, 2, 2), q_block=16, kv_block=8),
    "head_pattern": HeadPattern(q_block=16, kv_block=8, max_error=0.9),
    "semantic_clusters": SemanticClusters(num_q=5, num_kv=9),
    "sorted_clusters": SortedClusters(q_block=16, kv_block=8, num_q=5, num_kv=9),
}
ESTIMATORS = {
    "mean_pool": MeanPool(),
    "guarded": MeanPool(similarity=0.06),
    "error_aware": ErrorAware(),
    "error_aware keys": ErrorAware(kind="keys"),
    "router": Router(),
    "oracle": Oracle(),
    "head_pattern": Band(),
}
POLICIES = {
    "hybrid": lambda k: Hybrid(k=k, p=0.4),
    "spargeattention": lambda k: Hybrid(k=k, p=0.4, keep_crossing=False),
    "trained": lambda k: TrainedHybrid(k=k, p=0.4),
    "pairs": lambda k: TokenHybrid(k=k),
    "by error": lambda k: ErrorBudget(k=k),
    "by error of a head": lambda k: ErrorBudget(k=k, scope="head", unit="tokens"),
    "by error of a layer": lambda k: ErrorBudget(k=k, scope="layer"),
}


def rows():
    """Yield layouts x estimators x policies: all layouts, and the rest on blocks of both kinds."""
    yield "head_pattern", "head_pattern", "hybrid"
    for layout in LAYOUTS:
        yield from ((layout, estimator, "hybrid") for estimator in ("mean_pool", "error_aware"))
    for layout in ("tiles", "semantic_clusters"):
        for estimator in ("guarded", "error_aware keys", "router", "oracle"):
            yield layout, estimator, "hybrid"
        yield from ((layout, "error_aware", policy) for policy in POLICIES if policy != "hybrid")


ROWS = list(rows())
every = pytest.mark.parametrize("row", ROWS, ids=[", ".join(row) for row in ROWS])


def attention(row, k, layout=None, compensation=None):
    layout = layout or LAYOUTS[row[0]]
    parts = ESTIMATORS[row[1]], POLICIES[row[2]](k), compensation or Centroid()
    made = SparseAttention(SparseMethod(layout, *parts), HEADS, DIM)
    if isinstance(made.layout, PerHead):
        made.layout.set_choice(torch.tensor([1, 2, 4]))  # temporal-major, tiles, clusters
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def qkv(grid, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, HEADS, grid.num_tokens, DIM)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def masked(row, grid=GRID, k=0.3, x=None):
    sparse = attention(row, k)
    x = qkv(grid) if x is None else x
    out = sparse(*x, grid, torch.ones(len(x[0])))
    return sparse.mask, out


@every
def test_autocast_changes_no_mask(row):
    x = [y.float() for y in qkv(GRID)]
    expected, _ = masked(row, x=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = masked(row, x=x)
    assert torch.equal(found.selected, expected.selected)


def test_autocast_changes_no_attention_mass():
    q, k, v = (x.float() for x in qkv(GRID))
    layouts = Tiles(block=(2, 2, 4))(q, k, v, GRID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Oracle()(q, k, v, *layouts).score
    assert torch.equal(found, Oracle()(q, k, v, *layouts).score)


@every
def test_everything_selected_equals_dense_attention(row):
    q, k, v = qkv(TEXT)
    for compensation in (Drop(), Centroid()):
        out = attention(row, 1.0, compensation=compensation)(q, k, v, TEXT, torch.ones(1))
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def tokens_of(mask, h):
    """Return bool [S, S], which pairs of tokens, in sequence order, are computed exactly."""
    blocks, orders = [], []
    for layout in (mask.q_layout, mask.kv_layout):
        offsets = layout.offsets.expand(1, HEADS, -1)[0, h]
        num_tokens = int(offsets[-1])
        token = torch.arange(num_tokens)
        orders.append(token if layout.order is None else layout.order.expand(1, HEADS, -1)[0, h])
        blocks.append(block_of_token(offsets, num_tokens))
    in_order = mask.selected[0, h][blocks[0]][:, blocks[1]]
    found = torch.zeros_like(in_order)
    found[orders[0][:, None], orders[1][None, :]] = in_order
    return found


@every
def test_density_equals_a_count_of_token_pairs_and_text_is_dense(row):
    mask, out = masked(row, TEXT)
    text = TEXT.is_text()
    assert out.isfinite().all()
    for h in range(HEADS):
        pairs = tokens_of(mask, h)
        assert float(mask.density[0, h]) == pytest.approx(float(pairs.double().mean()), abs=1e-12)
        assert pairs.any(1).all() and not pairs.all()
        assert pairs[text].all() and pairs[:, text].all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [GRID, TEXT, ONE])
def test_permute_and_unpermute_are_inverse(layout, grid):
    x = qkv(grid)
    alone = {"semantic_clusters": SemanticClusters(), "sorted_clusters": SortedClusters()}
    layout = alone.get(layout, LAYOUTS[layout]) if grid is ONE else LAYOUTS[layout]
    if isinstance(layout, PerHead):
        layout = layout.for_heads(HEADS)
        layout.set_choice(torch.tensor([1, 2, 4]))
    for side in layout(*x, grid):
        assert torch.equal(side.unpermute(side.permute(x[0])), x[0])


def degenerate(kind):
    q, k, v = qkv(GRID)
    if kind == "constant":
        q, k = torch.ones_like(q), torch.ones_like(k)
    elif kind == "duplicates":  # fewer tokens that differ than clusters
        q, k, v = (x[:, :, torch.arange(GRID.num_tokens) % 3] for x in (q, k, v))
    else:
        k[:, :, 0] += 100
    return q, k, v


@every
def test_degenerate_inputs_give_means_of_the_values(row):
    for kind in ("constant", "duplicates", "one far away"):
        x = degenerate(kind)
        mask, out = masked(row, x=x)
        assert mask.selected.any(-1).all(), kind
        low, high = x[2].amin(2, keepdim=True), x[2].amax(2, keepdim=True)
        assert (out >= low - 1e-9).all() and (out <= high + 1e-9).all(), kind


@every
def test_one_token_attends_to_itself(row):
    alone = {"semantic_clusters": SemanticClusters(), "sorted_clusters": SortedClusters()}
    x = qkv(ONE)
    out = attention(row, 0.3, alone.get(row[0]))(*x, ONE, torch.ones(1))
    torch.testing.assert_close(out, x[2])


def digest(mask, sample):
    """Return a hash of a sample's mask, its blocks and its order."""
    found = hashlib.sha256()
    for layout in (mask.q_layout, mask.kv_layout):
        for x in (layout.offsets, layout.order):
            if x is not None:
                found.update((x if x.ndim == 1 else x[sample]).long().numpy().tobytes())
    found.update(mask.selected[sample].numpy().tobytes())
    return found.hexdigest()


def hashes(samples):
    x = qkv(GRID, batch=2, dtype=torch.float32)
    found = {}
    for row, sample in itertools.product(ROWS, samples):
        mask, _ = masked(row, x=[t[sample : sample + 1] for t in x])
        found[f"{row}, sample {sample}"] = digest(mask, 0)
    return found


@pytest.mark.multi
def test_one_and_two_processes_choose_the_same_masks():
    """Two ranks of a gloo group hold a sample each; one process holds both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**env, "WORLD_SIZE": "2", "RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = hashes(range(2))
    torch.set_num_threads(threads)
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in said:
        assert json.loads(text.splitlines()[-1]) == alone
    assert len(set(alone.values())) > len(ROWS)  # they are masks of their own


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, hashes([torch.distributed.get_rank()]))
    sys.stdout.write(json.dumps(gathered[0] | gathered[1]) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
