"""The runner: checks each contestant against plain PyTorch, then times what is right."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.benchmarks.cases import (
    DENSE_ROWS,
    DENSE_SPARSITY,
    Case,
    Shape,
    cases,
    clusters,
    layouts,
    random_mask,
)
from gossamer.benchmarks.contestants import Contestant
from gossamer.benchmarks.settings import Settings
from gossamer.benchmarks.timing import Stopwatch, Timing
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.mask import BlockMask
from gossamer.sparse.policies import Hybrid

log = logging.getLogger(__name__)

OUT_OF_TIME = "out of time"
CHECK_HEADS, CHECK_TOKENS = 2, 2000
CHECK_SPARSITY = 0.7
_FLOPS_PER_PAIR = {"forward": 4, "backward": 10, "total": 14}  # times the head dim
_NEEDS_GRADIENT = ("backward", "total")
_OF_MASKS = ("lists", "mask")  # the same for every contestant that takes the same lists
_MAX_REASON = 120


@dataclass(frozen=True)
class Row:
    """One contestant on one case; a phase that was not timed holds the reason instead."""

    shape: Shape
    case: Case | None  # None: dense attention
    contestant: str
    is_dense: bool
    density: float  # share of query-key pairs computed exactly
    errors: dict[str, float]  # of the check, relative to fp32
    phases: dict[str, Timing | str] = field(default_factory=dict)

    def timing(self, phase: str) -> Timing | None:
        found = self.phases.get(phase)
        return found if isinstance(found, Timing) else None

    def tflops(self, phase: str) -> float | None:
        """Return the rate of the kept work alone: masks and centroids add time but no work."""
        timing = self.timing(phase)
        if timing is None or phase not in _FLOPS_PER_PAIR:
            return None
        pairs = self.density * self.shape.heads * self.shape.tokens**2
        flops = _FLOPS_PER_PAIR[phase] * self.shape.head_dim * pairs
        return flops / timing.median_ms / 1e9

    @property
    def notes(self) -> dict[str, str]:
        return {phase: found for phase, found in self.phases.items() if isinstance(found, str)}


@dataclass(frozen=True)
class Check:
    """How far a contestant is from fp32, and why some phases must not be timed."""

    errors: dict[str, float]
    failures: dict[str, str]


class Runner:
    """Measures the settings' contestants on their cases; `stopped` says why it ended early."""

    def __init__(
        self,
        settings: Settings,
        contestants: Sequence[Contestant],
        stopwatch: Stopwatch,
        *,
        device: torch.device,
        dtype: torch.dtype,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.contestants = sorted(contestants, key=lambda contestant: not contestant.is_dense)
        self.stopped = ""
        self._stopwatch = stopwatch
        self._device, self._dtype = device, dtype
        self._now, self._start = now, now()
        self._masks: dict[tuple[object, ...], Timing | str] = {}
        self._checks: dict[tuple[object, ...], Check] = {}

    @property
    def num_rows(self) -> int:
        num_dense = sum(contestant.is_dense for contestant in self.contestants)
        per_sparse = sum(len(self._cases((block,))) for block in self.settings.block)
        per_shape = num_dense + per_sparse * (len(self.contestants) - num_dense)
        return per_shape * len(self.settings.shape)

    def rows(self) -> Iterator[Row]:
        """Yield each row once it is measured: dense attention first, which the others relate to."""
        try:
            yield from self._rows()
        except torch.AcceleratorError as error:
            self.stopped = f"stopped: the GPU is lost ({reason(error)})"

    def _rows(self) -> Iterator[Row]:
        for shape in self.settings.shape:
            leaves = self._random(3, shape.heads, shape.tokens, shape.head_dim)
            for contestant in self.contestants:
                for block in (None,) if contestant.is_dense else self.settings.block:
                    if self._is_late():
                        return
                    # Recompilations are limited, and a new geometry compiles anew anyway.
                    torch.compiler.reset()
                    for case in self._cases((block,)) if block else (None,):
                        if self._is_late():
                            return
                        is_clustered = case is not None and case.rows == "clusters"
                        key = (contestant.name, block, shape.head_dim, is_clustered)
                        if key not in self._checks:
                            self._checks[key] = self._check(contestant, *key[1:])
                        yield self._row(contestant, shape, case, leaves, self._checks[key])

    def _cases(self, blocks: tuple[tuple[int, int], ...]) -> list[Case]:
        return cases(blocks, self.settings.sparsity, self.settings.rows)

    def _is_late(self) -> bool:
        if self._now() - self._start >= self.settings.seconds:
            self.stopped = f"stopped after {self.settings.seconds:g} s"
        return bool(self.stopped)

    def _random(self, count: int, heads: int, tokens: int, head_dim: int) -> list[Tensor]:
        generator = torch.Generator(self._device).manual_seed(0)
        return [
            torch.randn(
                1, heads, tokens, head_dim,
                generator=generator, device=self._device, dtype=self._dtype,
            ).requires_grad_()
            for _ in range(count)
        ]  # fmt: skip

    def _check(
        self,
        contestant: Contestant,
        block: tuple[int, int] | None,
        head_dim: int,
        is_clustered: bool,
    ) -> Check:
        """Compare a contestant with plain PyTorch in fp32 on a small shape with tails."""
        rows = "clusters" if is_clustered else "skewed"
        case = Case(block or (64, 64), CHECK_SPARSITY, rows)
        if contestant.is_dense:
            case = Case(case.block, DENSE_SPARSITY, DENSE_ROWS)
        mask = self._mask(case, CHECK_HEADS, CHECK_TOKENS)
        *leaves, gradient = self._random(4, CHECK_HEADS, CHECK_TOKENS, head_dim)
        gradient = gradient.detach()
        exact_leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
        exact_out = contestant.truth(*exact_leaves, mask.blocks)
        exact_grads = torch.autograd.grad(exact_out, exact_leaves, gradient.float())
        check = Check({}, {})
        phases: tuple[str, ...] = ("forward", *_NEEDS_GRADIENT)
        try:
            with torch.set_grad_enabled(contestant.has_gradient):
                out = contestant.attend(*leaves, contestant.arguments(mask, leaves))
            self._compare(contestant, check, phases, {"out": (out, exact_out)})
            phases = _NEEDS_GRADIENT
            if not contestant.has_gradient:
                check.failures.update(dict.fromkeys(phases, "forward only"))
            elif not check.failures:
                grads = torch.autograd.grad(out, leaves, torch.empty_like(out).copy_(gradient))
                pairs = zip(("dq", "dk", "dv"), zip(grads, exact_grads, strict=True), strict=True)
                self._compare(contestant, check, phases, dict(pairs))
        except torch.AcceleratorError:
            raise
        except Exception as error:  # one that cannot run is a row: the others go on
            check.failures.update(dict.fromkeys(phases, reason(error)))
        return check

    def _compare(
        self,
        contestant: Contestant,
        check: Check,
        phases: tuple[str, ...],
        results: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Add the relative errors to the check, and to the failures of phases if one is too large.

        Allowed is a unit in the last place of the dtype, unless the contestant rounds more.
        """
        allowed = contestant.tolerance or max(torch.finfo(self._dtype).eps, 1e-5)
        for name, (actual, exact) in results.items():
            actual, exact = actual.detach().double(), exact.detach().double()
            error = float((actual - exact).norm() / exact.norm())
            check.errors[name] = error
            if not error <= allowed:
                check.failures.update(dict.fromkeys(phases, f"wrong: {name} off by {error:.1e}"))

    def _mask(self, case: Case, heads: int, tokens: int) -> BlockMask:
        if case.rows == "clusters":
            return random_mask(case, heads, *clusters(tokens, heads, case.block, self._device))
        return random_mask(case, heads, *layouts(tokens, case.block, self._device))

    def _row(
        self,
        contestant: Contestant,
        shape: Shape,
        case: Case | None,
        leaves: list[Tensor],
        check: Check,
    ) -> Row:
        mask = None if case is None else self._mask(case, shape.heads, shape.tokens)
        density = 1.0 if mask is None else float(mask.density.mean())
        row = Row(shape, case, contestant.name, contestant.is_dense, density, check.errors)
        runs = _Runs(contestant, shape, case, leaves, mask)
        for phase in self.settings.phase:
            if phase in _OF_MASKS and mask is None:
                continue
            if phase in check.failures:
                row.phases[phase] = check.failures[phase]
            elif self._is_late():
                row.phases[phase] = OUT_OF_TIME
            elif phase in _OF_MASKS:
                is_clustered = case.rows == "clusters"
                key = (
                    phase,
                    shape.name,
                    contestant.prepare,
                    case.block,
                    case.sparsity,
                    is_clustered,
                )
                if key not in self._masks:
                    self._masks[key] = self._time(getattr(runs, phase))
                row.phases[phase] = self._masks[key]
            else:
                row.phases[phase] = self._time(getattr(runs, phase))
        return row

    def _time(self, make: Callable[[], Callable[[], object]]) -> Timing | str:
        self._stopwatch.mark()
        try:
            return self._stopwatch.time(make())
        except torch.AcceleratorError:
            raise
        except Exception as error:  # as in _check
            return reason(error)


class _Runs:
    """Makes the function to time for each phase of one row."""

    def __init__(
        self,
        contestant: Contestant,
        shape: Shape,
        case: Case | None,
        leaves: list[Tensor],
        mask: BlockMask | None,
    ) -> None:
        self.contestant, self.tokens, self.leaves = contestant, shape.tokens, leaves
        self.given = mask
        if mask is not None and case is not None:
            self.blocks = mask.blocks  # made here: an input, not part of what is timed
            self.policy = Hybrid(k=1 - case.sparsity, p=0.0).to(leaves[0].device)

    def forward(self) -> Callable[[], object]:
        prepared = self._prepared()

        def run() -> Tensor:
            with torch.no_grad():
                return self.contestant.attend(*self.leaves, prepared)

        return run

    def backward(self) -> Callable[[], object]:
        out = self.contestant.attend(*self.leaves, self._prepared())
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, self.leaves, gradient, retain_graph=True)

    def lists(self) -> Callable[[], object]:
        """Turn what is selected into the lists of both directions."""
        parts = (self.given.q_layout, self.given.kv_layout, self.given.selected)
        return lambda: self.contestant.prepare(BlockMask(*parts), self.tokens)

    def mask(self) -> Callable[[], object]:
        return self._build

    def total(self) -> Callable[[], object]:
        """Build a mask and leave it, then attend by the given one: both rows do equal work."""
        prepared = self._prepared()
        with torch.no_grad():
            gradient = torch.randn_like(self.contestant.attend(*self.leaves, prepared))

        def run() -> object:
            if self.given is not None:
                self._build()
            out = self.contestant.attend(*self.leaves, prepared)
            return torch.autograd.grad(out, self.leaves, gradient)

        return run

    def _prepared(self) -> object:
        return None if self.given is None else self.contestant.arguments(self.given, self.leaves)

    def _build(self) -> object:
        q, k, v = (leaf.detach() for leaf in self.leaves)
        scores = MeanPool()(q, k, v, self.given.q_layout, self.given.kv_layout)
        return self.contestant.prepare(self.policy(scores), self.tokens)


def reason(error: Exception) -> str:
    """Return an error in one short line."""
    text = f"{error!s} {error.__cause__ or ''}"
    if "NoValidChoicesError" in text or "divisible by BLOCK" in text:
        return f"no stock kernel for this block size in torch {torch.__version__}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    said = f"{name}{line}"
    return said if len(said) <= _MAX_REASON else f"{said[: _MAX_REASON - 1]}…"
