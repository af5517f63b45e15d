"""What is measured: the shapes, and random masks over equal blocks with a tail or over clusters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.sparse.layout import BlockLayout, RowMajor, TokenGrid
from gossamer.sparse.mask import BlockMask

ROWS = ("uniform", "skewed", "clusters")
SPREAD = 0.5  # standard deviation of the logarithm of a cluster's size
SKEW = 7  # kv blocks of the longest row over those of the shortest one
MIN_SKEWED_SPARSITY = 0.6  # below, the longest rows would need more blocks than there are
SINKS = 4  # kv blocks of each head that every skewed row selects
DENSE_SPARSITY, DENSE_ROWS = 0.0, "uniform"


@dataclass(frozen=True)
class Shape:
    """Queries, keys and values of one self-attention, batch 1."""

    name: str
    heads: int
    tokens: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """One mask of a shape; `block` is (tokens of a q block, of a kv block), a mean for clusters."""

    block: tuple[int, int]
    sparsity: float
    rows: str


SHAPES = {
    "A": Shape("A", 12, 32_760, 128),  # Wan2.1 1.3B, 81 frames of 480p
    "B": Shape("B", 8, 75_600, 128),  # 8 of the 40 heads of Wan2.1 14B, 81 frames of 720p
    "C": Shape("C", 24, 118_800, 128),  # HunyuanVideo, 129 frames of 720p
}


def cases(
    blocks: tuple[tuple[int, int], ...], sparsities: tuple[float, ...], rows: tuple[str, ...]
) -> list[Case]:
    """Return every combination; where all blocks are selected no row can be skewed."""
    return [
        Case(block, sparsity, kind)
        for block in blocks
        for sparsity in sparsities
        for kind in (rows if sparsity > 0 else (DENSE_ROWS,))
    ]


def layouts(
    tokens: int, block: tuple[int, int], device: torch.device
) -> tuple[BlockLayout, BlockLayout]:
    """Return the q and the kv layout: runs of tokens, the last run shorter."""
    row_major = RowMajor(q_block=block[0], kv_block=block[1])
    q_layout, kv_layout = row_major.build(TokenGrid(tokens, 1, 1))
    return q_layout.to(device), kv_layout.to(device)


def clusters(
    tokens: int, heads: int, block: tuple[int, int], device: torch.device, seed: int = 0
) -> tuple[BlockLayout, BlockLayout]:
    """Return layouts like those of k-means: each head has its own sizes, log-normal around block.

    The host knows no bound of a size but the number of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    layouts = []
    for mean in block:
        num_blocks = max(1, round(tokens / mean))
        size = torch.randn(1, heads, num_blocks, generator=generator, dtype=torch.float64)
        share = (SPREAD * size).exp().cumsum(-1)
        ends = (share / share[..., -1:] * tokens).round().int()
        offsets = torch.cat([ends.new_zeros(1, heads, 1), ends], -1).to(device)
        layouts.append(BlockLayout(offsets, tokens))
    return layouts[0], layouts[1]


def random_mask(
    case: Case, heads: int, q_layout: BlockLayout, kv_layout: BlockLayout, seed: int = 0
) -> BlockMask:
    """Select random kv blocks for each q block.

    Uniform rows and those over clusters all select the same number. Skewed rows select numbers that
    vary SKEW-fold between heads and rows around the same mean, and begin with their head's sinks.
    """
    device = q_layout.offsets.device
    generator = torch.Generator(device).manual_seed(seed)
    num_q, num_kv = q_layout.num_blocks, kv_layout.num_blocks
    counts = row_counts(case, heads, num_q, num_kv, seed).to(device)
    score = torch.rand(heads, num_q, num_kv, generator=generator, device=device)
    if case.rows == "skewed":
        num_sinks = min(SINKS, int(counts.min()))
        sinks = torch.rand(heads, num_kv, generator=generator, device=device).topk(num_sinks)
        score.scatter_(-1, sinks.indices[:, None].expand(-1, num_q, -1), 2.0)
    order = score.argsort(-1, descending=True)
    keep = torch.arange(num_kv, device=device) < counts[..., None]
    return BlockMask(q_layout, kv_layout, torch.zeros_like(keep).scatter_(-1, order, keep)[None])


def row_counts(case: Case, heads: int, num_q: int, num_kv: int, seed: int = 0) -> Tensor:
    """Return how many of num_kv blocks each row selects, int64 [heads, num_q]."""
    mean = (1 - case.sparsity) * num_kv
    if case.rows != "skewed":
        return torch.full((heads, num_q), max(1, round(mean)))
    generator = torch.Generator().manual_seed(seed)
    exact = mean * _spread(heads, generator)[:, None] * _spread(num_q, generator)
    # Rounding the running sum keeps the mean: each row's rounding error goes to the next one.
    counts = exact.flatten().cumsum(0).round().diff(prepend=exact.new_zeros(1))
    return counts.clamp(1, num_kv).long().view(heads, num_q)


def _spread(size: int, generator: torch.Generator) -> Tensor:
    """Return `size` factors of mean 1 in random order, the largest sqrt(SKEW) times the least."""
    factors = torch.linspace(1, SKEW**0.5, size, dtype=torch.float64)
    return (factors / factors.mean())[torch.randperm(size, generator=generator)]
