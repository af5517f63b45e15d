"""The second filter of SpargeAttention against its loop, tile by tile, as the paper walks it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention, filtered_attention
from gossamer.kernels.blocks import Blocks


def problem(
    q_block: int = 96, kv_block: int = 70, tokens: int = 300, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    offsets = [
        torch.tensor([*range(0, tokens, block), tokens], dtype=torch.int32)
        for block in (q_block, kv_block)
    ]
    rows, columns = (len(x) - 1 for x in offsets)
    selected = torch.rand(2, 3, rows, columns, generator=generator) < 0.7
    selected[0, 0, 1] = False
    q, k, v, selected, *offsets = (x.to(device) for x in (4 * q, k, v, selected, *offsets))
    return q, k, v, Blocks.from_selected(selected, *offsets, q_block, kv_block)


def walk(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, limit: float
) -> tuple[Tensor, Tensor, int, int]:
    """One head, by the online softmax: out, lse, tiles skipped, tiles met."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:1], -math.inf, dtype=q.dtype)
    skipped = met = 0
    selected = blocks.selected()[0, 0]
    q_ends, kv_ends = blocks.q_offsets.tolist(), blocks.kv_offsets.tolist()
    for i in range(len(q_ends) - 1):
        for start in range(q_ends[i], q_ends[i + 1], 64):
            rows = slice(start, min(start + 64, q_ends[i + 1]))
            acc, total = torch.zeros_like(q[rows]), torch.zeros_like(lse[rows])
            peak = torch.full_like(total, -math.inf)
            for j in selected[i].nonzero().flatten().tolist():
                for first in range(kv_ends[j], kv_ends[j + 1], 64):
                    columns = slice(first, min(first + 64, kv_ends[j + 1]))
                    logits = q[rows] @ k[columns].T / math.sqrt(q.shape[-1])
                    local = logits.max(1).values
                    new_peak = torch.maximum(peak, local)
                    decay, peak = (peak - new_peak).exp(), new_peak
                    prob = (logits - peak[:, None]).exp()
                    total, acc = total * decay + prob.sum(1), acc * decay[:, None]
                    met += 1
                    if (local - peak).max() < limit:
                        skipped += 1
                    else:
                        acc = acc + prob @ v[columns]
            has_key = total > 0
            out[rows] = torch.where(has_key[:, None], acc / total[:, None], 0)
            lse[rows] = peak + total.log()
    return out, lse, skipped, met


@pytest.mark.parametrize("limit", [-50.0, -4.0, -2.0, -1.0, 0.0])
@pytest.mark.parametrize(("q_block", "kv_block"), [(96, 70), (64, 64), (128, 30), (16, 200)])
def test_it_equals_the_walk_over_tiles(limit: float, q_block: int, kv_block: int) -> None:
    q, k, v, blocks = problem(q_block=q_block, kv_block=kv_block)
    out, lse, share = filtered_attention(q, k, v, blocks, torch.tensor([limit]))
    for b in range(2):
        for h in range(3):
            one = Blocks.from_selected(
                blocks.selected()[b : b + 1, h : h + 1],
                blocks.q_offsets,
                blocks.kv_offsets,
                q_block,
                kv_block,
            )
            expected, lse_, skipped, met = walk(q[b, h], k[b, h], v[b, h], one, limit)
            torch.testing.assert_close(out[b, h], expected)
            torch.testing.assert_close(lse[b, h], lse_)
            assert share[b, h].item() == pytest.approx(skipped / met)


@pytest.mark.parametrize("limit", [-4.0, -1.0, 0.0])
@pytest.mark.parametrize(("q_block", "kv_block"), [(96, 70), (64, 64), (16, 30)])
def test_the_kernel_equals_the_reference(
    device: str, limit: float, q_block: int, kv_block: int
) -> None:
    q, k, v, blocks = problem(q_block=q_block, kv_block=kv_block, tokens=192, device=device)
    q, k, v = (torch.nn.functional.pad(x, (0, 8)).float() for x in (q, k, v))  # head dim 16
    limits = torch.tensor([limit, 2 * limit, float("-inf")], device=device)
    found = filtered_attention(q, k, v, blocks, limits, scale=8**-0.5, backend="triton")
    expected = filtered_attention(q, k, v, blocks, limits, scale=8**-0.5, backend="reference")
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert limit == 0.0 or (found[2][:, 2] == 0).all()


def test_blocks_over_128_tokens_are_refused_by_the_kernel(device: str) -> None:
    q, k, v, blocks = problem(q_block=200, device=device)
    q, k, v = (torch.nn.functional.pad(x, (0, 8)).float() for x in (q, k, v))
    with pytest.raises(ValueError, match="at most 128 tokens"):
        filtered_attention(q, k, v, blocks, torch.tensor([-1.0], device=device), backend="triton")


def test_the_lse_is_that_of_the_unfiltered_attention_and_a_low_limit_skips_nothing() -> None:
    q, k, v, blocks = problem()
    out, lse = block_sparse_attention(q, k, v, blocks)
    all_kept, lse_kept, none = filtered_attention(q, k, v, blocks, torch.tensor([-1e6]))
    torch.testing.assert_close(all_kept, out)
    torch.testing.assert_close(lse_kept, lse)
    assert (none == 0).all()
    filtered, lse_filtered, some = filtered_attention(q, k, v, blocks, torch.tensor([-1.0]))
    torch.testing.assert_close(lse_filtered, lse)
    assert some.mean() > 0.05 and not torch.allclose(filtered, out)


def test_each_head_has_its_own_limit() -> None:
    q, k, v, blocks = problem()
    limits = torch.tensor([-1e6, -3.0, -0.5])
    share = filtered_attention(q, k, v, blocks, limits)[2]
    assert (share[:, 0] == 0).all()
    for h in range(3):
        alone = filtered_attention(q, k, v, blocks, limits[h : h + 1])[2]
        assert torch.equal(alone[:, h], share[:, h])


def test_more_is_skipped_at_a_higher_limit() -> None:
    q, k, v, blocks = problem()
    shares = [
        filtered_attention(q, k, v, blocks, torch.tensor([x]))[2] for x in (-8.0, -4.0, -2.0, 0.0)
    ]
    for fewer, more in pairwise(shares):
        assert (fewer <= more).all()


@pytest.mark.parametrize(
    ("limit", "backend", "said"),
    [
        (torch.tensor([0.5]), "auto", "skip_below must be at most 0, got"),
        (torch.tensor([float("nan")]), "auto", "skip_below must be at most 0, got"),
        (torch.tensor([-1.0, -2.0]), "auto", r"of shape \[1\] or \[3\]"),
        (torch.tensor([-1.0]).double(), "auto", "must be float32"),
        (torch.tensor([-1.0], device="meta"), "auto", "device cpu, got meta"),
        (torch.tensor([-1.0]), "hopper", "backend must be 'auto', 'reference' or 'triton'"),
        (torch.tensor([-1.0]), "triton", "head dim must be one of"),
    ],
)
def test_wrong_arguments_are_refused(limit: Tensor, backend: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        filtered_attention(*problem(), limit, backend=backend)
