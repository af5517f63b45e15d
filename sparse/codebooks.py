"""The codebooks of one layer from step to step, and when its tokens are clustered again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.sparse.layout import BlockLayout, TokenGrid
from gossamer.sparse.layouts.clusters import Clusters, Codebook
from gossamer.sparse.mask import BlockMask, BlockScores


class HostScalar:
    """A scalar on its way to the host: a CUDA tensor is copied without waiting for it."""

    def __init__(self, value: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._value = value.detach()
        if value.is_cuda:
            pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value = pinned.copy_(self._value, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> float:
        """Return the number; a step later it has long arrived, and nothing waits."""
        if self._ready is not None:
            self._ready.synchronize()
        return float(self._value)


@dataclass(frozen=True)
class Carried:
    """What one guidance branch hands from step to step."""

    codebook: Codebook
    at_clustering: HostScalar | None = None  # probe error of the step that made the clusters
    latest: HostScalar | None = None  # of the step before

    def observe(self, error: Tensor) -> "Carried":
        """Return the state after a step of this probe error (a scalar)."""
        latest = HostScalar(error)
        return Carried(self.codebook, self.at_clustering or latest, latest)

    def has_grown(self, growth: float) -> bool:
        """Return whether the error has passed (1 + growth) of its value at the clustering."""
        if self.at_clustering is None or self.latest is None:
            return True
        return not self.latest.read() <= (1 + growth) * self.at_clustering.read()


def probe_error(scores: BlockScores, mask: BlockMask, v: Tensor) -> Tensor:
    """Return the error that the probe foresees of a mask with centroids, relative to v's size.

    A scalar: the squared error of the output summed over the unselected blocks, meaned over
    tokens and heads, over the mean square norm of v [B, H, S, D].
    """
    assert scores.error is not None
    left = (scores.score * ~mask.selected).sum(-1) * scores.error  # [B, H, Nq]
    size = mask.q_layout.sizes.to(left.dtype)
    mean = (left * size).sum(-1) / size.sum(-1)
    return mean.mean() / v.float().square().sum(-1).mean()


class Codebooks:
    """Groups the tokens of one layer into clusters, going on from the step before.

    `branch` names the guidance branch of the next call. None, as in training, carries nothing:
    each forward starts cold, so that its mask depends on its own q and k alone.
    """

    def __init__(self, layout: Clusters) -> None:
        self.layout = layout
        self.branch: str | None = None
        self.hit_rate: Tensor | None = None  # fp32 [2, B, H] of the last warm step
        self._hits: Tensor | None = None  # fp32 [2, H], summed over the warm steps
        self._warm = 0  # steps that clustered from a codebook
        self.carried: dict[str, Carried] = {}

    @property
    def mean_hit_rate(self) -> Tensor | None:
        """Return the hit rate meaned over all warm steps so far, fp32 [2, H]; None without any."""
        return None if self._hits is None else self._hits / self._warm

    def start(self, branch: str | None, is_first: bool) -> None:
        """Make the next call one of this branch; its first step starts cold."""
        self.branch = branch
        if is_first and branch is not None:
            self.carried.pop(branch, None)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid
    ) -> tuple[BlockLayout, BlockLayout]:
        if self.branch is None:
            return self.layout(q, k, v, grid)
        before = self.carried.get(self.branch)
        if before is not None and not before.codebook.fits(q, self.layout.counts(grid), grid):
            before = None
        keep = self.layout.keep_until
        if before is not None and keep is not None and not before.has_grown(keep):
            return self.layout.layouts(before.codebook, grid)
        found = self.layout.cluster(q, k, grid, None if before is None else before.codebook)
        if before is not None:
            self.hit_rate = found.codebook.hit_rate(before.codebook)
            hits = self.hit_rate.mean(1)
            self._hits = hits if self._hits is None else self._hits + hits
            self._warm += 1
        self.carried[self.branch] = Carried(found.codebook)
        return found.q_layout, found.kv_layout

    def observe(self, scores: BlockScores, mask: BlockMask, v: Tensor) -> None:
        """Take note of this step's probe error, where labels are kept by it."""
        if self.branch is not None and self.layout.keep_until is not None:
            if scores.error is None:
                raise ValueError(
                    "layout.keep_until: allowed is null with an estimator that foresees no error; "
                    "leave it out or use estimator=error_aware"
                )
            error = probe_error(scores, mask, v)
            self.carried[self.branch] = self.carried[self.branch].observe(error)
