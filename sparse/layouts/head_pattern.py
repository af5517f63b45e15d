"""SVG1's layout: frame-major or temporal-major order, chosen anew for each head (arXiv 2502.01776).

A spatial head attends within its own and nearby frames, a temporal head to the same place in all
frames: in frame-major and in temporal-major order, both are a band along the diagonal. Which of the
two fits is measured on a few query rows.
"""

from dataclasses import dataclass, fields
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels.block_pool.op import block_mean
from gossamer.sparse import orders
from gossamer.sparse.fp32 import no_autocast
from gossamer.sparse.layout import BlockLayout, TokenGrid, check_grid, positive
from gossamer.sparse.layouts.per_head import RunsPerHead

SPATIAL, TEMPORAL, NEITHER = range(3)
_GOLDEN = (sqrt(5) - 1) / 2
_LEAST = 1e-10
_MOST_PARTS = 64  # of the keys, in the products of the sampled rows


@dataclass(frozen=True, eq=False, kw_only=True)
class PatternLayout(BlockLayout):
    """A layout whose heads have a pattern, and how near its key blocks are to each query block."""

    pattern: Tensor  # int64 [B, H]: SPATIAL, TEMPORAL or NEITHER
    score: Tensor  # fp32 [3, Nq, Nk], for each pattern; rows sum to 1
    may_be_neither: bool  # False where the layout gives every head SPATIAL or TEMPORAL


class HeadPattern:
    """Give each head the order, frame-major or temporal-major, in which its attention is a band.

    For `rows` query rows spread over the whole video, the output under either band, of area
    `density` and with the first `sink_frames` frames and all text kept, is compared with the dense
    output; the lower mean squared error wins. A head in which both exceed `max_error` of the
    output's mean square has neither pattern and stays in frame-major order. Temporal-major order
    leaves the sink frames in front; a block that is half or more of their tokens counts as a sink.
    """

    def __init__(
        self,
        *,
        q_block: int = 128,
        kv_block: int = 64,
        rows: int = 64,
        density: float = 0.2,
        sink_frames: int = 1,
        max_error: float | None = None,
    ) -> None:
        self.block_shape = (positive("q_block", q_block), positive("kv_block", kv_block))
        self.rows = positive("rows", rows)
        self.density = density
        band_width(density, 1)  # refuses a density outside 0 to 1
        if int(sink_frames) != sink_frames or sink_frames < 0:
            raise ValueError(
                f"sink_frames={sink_frames}: allowed is an integer of at least 0; e.g. 1"
            )
        if max_error is not None and not max_error >= 0:
            raise ValueError(
                f"max_error={max_error}: allowed is at least 0, or null for the better of the two "
                "whatever its error; e.g. 0.5"
            )
        self.sink_frames, self.max_error = int(sink_frames), max_error
        self._runs = RunsPerHead(self._orders, self.block_shape)
        self._probes: dict[tuple[TokenGrid, torch.device], _Probe] = {}
        self._scores: dict[tuple[TokenGrid, torch.device], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[PatternLayout, PatternLayout]:
        """Return the q and the kv layout; q, k, v [B, H, S, D] in sequence order."""
        pattern = self.classify(q, k, v, grid)
        key = (grid, q.device)
        if key not in self._scores:
            self._scores[key] = self._scores_of(grid).to(q.device)
        q_layout, kv_layout = (
            PatternLayout(
                **{f.name: getattr(layout, f.name) for f in fields(BlockLayout)},
                pattern=pattern,
                score=self._scores[key],
                may_be_neither=self.max_error is not None,
            )
            for layout in self._runs(pattern, q, grid)
        )
        return q_layout, kv_layout

    def num_blocks(self, grid: TokenGrid) -> tuple[int, int]:
        """Return the number of q and of kv blocks, the same for every head."""
        q_layout, kv_layout = self._runs.build(grid)
        return q_layout.num_blocks, kv_layout.num_blocks

    def classify(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Return each head's pattern, int64 [B, H]: SPATIAL, TEMPORAL or NEITHER."""
        error = self.errors(q, k, v, grid)
        pattern = (error[..., TEMPORAL] < error[..., SPATIAL]).long()
        if self.max_error is None:
            return pattern
        return pattern.where(error.amin(-1) <= self.max_error, NEITHER)

    @torch.no_grad()
    def errors(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        """Return the squared output error of both bands over the output's square, fp32 [B, H, 2].

        Costs `rows` rows of dense attention, and those of the two bands, which share their weights.
        bfloat16 is multiplied as it is: all three are then attention with the same roundings
        of the logits, and the errors those of 64 sampled rows to within a few percent.
        """
        check_grid(grid, q)
        key = (grid, q.device)
        if key not in self._probes:
            self._probes[key] = self._probe(grid, q.device)
        probe = self._probes[key]
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32  # fp16 may overflow
        # Products of few rows and many keys are slow unless the keys come in parts.
        parts = probe.visible.shape[1]
        with no_autocast(q):
            rows = q[:, :, probe.row, None].movedim(3, 2).to(dtype)  # [B, H, 1, R, D]
            key, value = (x.to(dtype).unflatten(2, (parts, -1)) for x in (k, v))
            logits = (rows @ key.mT).float() * q.shape[-1] ** -0.5  # [B, H, parts, R, S / parts]
            weight = (logits - logits.amax((2, 4), keepdim=True)).exp().to(dtype)
            dense = _mean(weight, value)
            square = dense.square().sum((-2, -1))
            change = [
                (_mean(weight * visible, value) - dense).square().sum((-2, -1))
                for visible in probe.visible
            ]
        error = torch.stack(change, -1) / square.clamp(min=_LEAST)[..., None]
        return error.clamp(min=_LEAST)  # below it lies rounding

    def _orders(self, grid: TokenGrid) -> list[Tensor]:
        frame_major = orders.row_major(grid)
        return [frame_major, orders.temporal_major(grid, self.sink_frames), frame_major]

    def _probe(self, grid: TokenGrid, device: torch.device) -> "_Probe":
        row = sampled_rows(grid.num_video, self.rows)
        width = band_width(self.density, grid.num_video)
        is_sink = _is_sink_frame(grid, self.sink_frames)
        hidden = torch.zeros(2, len(row), grid.num_tokens, dtype=torch.bool)
        video = slice(grid.text_before, grid.text_before + grid.num_video)
        for pattern, place in enumerate(_places(grid)):
            far = (place[row, None] - place[None, :]).abs() > width
            hidden[pattern, :, video] = far & ~is_sink
        parts = max(n for n in range(1, _MOST_PARTS + 1) if grid.num_tokens % n == 0)
        visible = (~hidden).unflatten(2, (parts, -1)).movedim(2, 1)
        return _Probe((row + grid.text_before).to(device), visible.contiguous().to(device))

    def _scores_of(self, grid: TokenGrid) -> Tensor:
        """Return fp32 [3, Nq, Nk]: text first, then by turns the nearest sink and of the band.

        A sink is near at a like place in its frame. Taken first, the sinks alone would be a budget
        of 5 %: the first of 21 frames has as many tokens.
        """
        layouts = self._runs.stacked(grid)
        (q_place, q_position, _), (place, position, sink) = (
            self._means(grid, layout) for layout in layouts
        )
        is_sink = (sink >= 0.5)[:, None]  # [3, 1, Nk]
        band, nearest = (
            (of_q[..., None] - of_kv[:, None]).abs()
            for of_q, of_kv in ((q_place, place), (q_position, position))
        )
        turn = torch.where(
            is_sink,
            2 * _rank(nearest.masked_fill(~is_sink, torch.inf)),
            2 * _rank(band.masked_fill(is_sink, torch.inf)) + 1,
        )
        if layouts[1].text is not None:
            turn = turn.masked_fill(layouts[1].text, -1)
        score = (turn.amax(-1, keepdim=True) + 1 - turn).float()
        return score / score.sum(-1, keepdim=True)

    def _means(self, grid: TokenGrid, layout: BlockLayout) -> Tensor:
        """Return each block's mean place in the band, place in its frame, share of sinks [3, 3, N].

        The second axis is the pattern; all are of video tokens, and of no use for text.
        """
        spatial, temporal = _places(grid)
        positions = grid.height * grid.width
        video = slice(grid.text_before, grid.text_before + grid.num_video)
        token = torch.zeros(3, 3, grid.num_tokens, dtype=torch.float64)
        token[0, :, video] = torch.stack([spatial, temporal, spatial]).double()
        token[1, :, video] = (torch.arange(grid.num_video) % positions).double()
        token[2, :, video] = _is_sink_frame(grid, self.sink_frames).double()
        assert layout.order is not None
        ordered = token.gather(2, layout.order.expand_as(token)).flatten(0, 1)
        mean = block_mean(ordered[None, ..., None], layout.offsets, layout.block_size)
        return mean[0, ..., 0].unflatten(0, (3, 3))


def _rank(x: Tensor) -> Tensor:
    """Return the place of each entry in its row, sorted; of equals the first comes first."""
    return x.argsort(dim=-1, stable=True).argsort(-1)


class _Probe(NamedTuple):
    """The sampled queries, and the keys that each pattern lets them see, in equal parts."""

    row: Tensor  # int64 [R], tokens
    visible: Tensor  # bool [2, parts, R, S / parts]


def _mean(weight: Tensor, value: Tensor) -> Tensor:
    """Return the weighted mean of all parts' values, fp32 [B, H, R, D]."""
    total = (weight @ value).float().sum(2)
    size = weight.sum((2, 4), dtype=torch.float32)[..., None]
    return total / size.clamp(min=torch.finfo(torch.float32).tiny)


def band_width(density: float, num_tokens: int) -> float:
    """Return the w, in tokens, for which |i - j| <= w selects the share `density` of all pairs.

    SVG1's sparsity_to_width, of video tokens alone.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density={density}: allowed is a share from 0 to 1; e.g. density=0.2")
    return num_tokens * (1 - sqrt(1 - density))


def sampled_rows(num_tokens: int, rows: int) -> Tensor:
    """Return up to `rows` tokens, rising, int64: one in each of equal parts of the sequence.

    The golden ratio moves them within their parts, so that they fall into step with no axis.
    """
    rows = min(rows, num_tokens)
    part = torch.arange(rows, dtype=torch.float64)
    return ((part + (part * _GOLDEN).frac()) * (num_tokens / rows)).long()


def _places(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Return each video token's place in frame-major and in temporal-major order, int64."""
    token = torch.arange(grid.num_video)
    positions = grid.height * grid.width
    return token, token % positions * grid.frames + token // positions


def _is_sink_frame(grid: TokenGrid, sink_frames: int) -> Tensor:
    return torch.arange(grid.num_video) < sink_frames * grid.height * grid.width
