"""The results: a Markdown table, one line per row, and a JSON file with every figure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from gossamer.benchmarks.run import Row
from gossamer.benchmarks.timing import MIN_MS, MIN_REPEATS
from gossamer.train.study_output import heading

CUDNN = "dense-cudnn"
RATIOS = ("forward", "forward + mask", "backward", "backward + lists", "total")
_COLUMNS = (
    "shape", "block", "sparsity", "rows", "contestant",
    "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "mask ms", "total ms",
    "x cuDNN: fwd, +mask, bwd, +lists, total", "x best dense: the same", "x uniform: fwd, bwd",
    "host ms: fwd, bwd, mask", "GiB fwd, bwd", "note",
)  # fmt: skip
_NONE = "-"
_WORTH_SAYING = 0.01  # relative error of out; bf16 attention has 0.2 %


def markdown(rows: Sequence[Row], header: dict[str, str], progress: str) -> str:
    """Return the table, in the order of shape, case and contestant."""
    lines = [
        "# Attention, forward and backward",
        "",
        f"{heading(header)} {progress}",
        "",
        f"bf16, batch 1, normal data. Median (20-80 %) of at least {MIN_REPEATS} runs and "
        f"{MIN_MS:g} ms of the GPU's time, L2 flushed and the whole run queued before each; the "
        "host's time to queue it is told beside it. TFLOP/s count kept query-key pairs only, 4 D a "
        "pair forward and 10 D backward. Mask: from q and k to the index lists of both directions; "
        "lists: its last step, which the backward's transpose is a part of. "
        "Total: mask, forward and backward in one run. Every figure is of a contestant whose "
        "result agreed with fp32 PyTorch on a small shape. Memory: peak above the inputs.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + "---|" * len(_COLUMNS),
    ]
    return "\n".join([*lines, *(_line(row, rows) for row in _ordered(rows))]) + "\n"


def as_json(rows: Sequence[Row], header: dict[str, str], progress: str) -> str:
    """Return every figure; times in ms, memory in bytes."""
    entries = [_entry(row, rows) for row in _ordered(rows)]
    return json.dumps({**header, "progress": progress, "rows": entries}, indent=1) + "\n"


def ratios(row: Row, rows: Sequence[Row], *, only_cudnn: bool) -> dict[str, float]:
    """Return how many times faster than dense attention of the same shape each part of a row is."""
    dense = [
        other
        for other in rows
        if other.is_dense
        and other.shape == row.shape
        and (not only_cudnn or other.contestant == CUDNN)
    ]
    found = {}
    for name in RATIOS:
        phases = name.split(" + ")
        rival = min((t.median_ms for other in dense if (t := other.timing(phases[0]))), default=0)
        own = [timing.median_ms for timing in map(row.timing, phases) if timing]
        if rival and len(own) == len(phases):
            found[name] = rival / sum(own)
    return found


def against_uniform(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Return the rate of skewed rows over that of uniform rows, all else equal."""
    if row.case is None or row.case.rows == "uniform":
        return {}
    uniform = replace(row.case, rows="uniform")
    for other in rows:
        if (other.shape, other.contestant, other.case) == (row.shape, row.contestant, uniform):
            rates = {p: (row.tflops(p), other.tflops(p)) for p in ("forward", "backward")}
            return {p: own / rival for p, (own, rival) in rates.items() if own and rival}
    return {}


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Sort by shape, dense attention first, then by case, in the order of the run."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cases = [None, *dict.fromkeys(row.case for row in rows if row.case)]
    return sorted(rows, key=lambda row: (shapes.index(row.shape), cases.index(row.case)))


def _line(row: Row, rows: Sequence[Row]) -> str:
    case, to_cudnn = row.case, ratios(row, rows, only_cudnn=True)
    to_best, to_uniform = ratios(row, rows, only_cudnn=False), against_uniform(row, rows)
    cells = [
        row.shape.name,
        f"{case.block[0]}x{case.block[1]}" if case else _NONE,
        f"{case.sparsity:.0%}" if case else "0%",
        case.rows if case else _NONE,
        row.contestant,
        _milliseconds(row, "forward"),
        _number(row.tflops("forward"), ".0f"),
        _milliseconds(row, "backward"),
        _number(row.tflops("backward"), ".0f"),
        _milliseconds(row, "mask"),
        _milliseconds(row, "total"),
        " ".join(_number(to_cudnn.get(name), ".2f") for name in RATIOS),
        " ".join(_number(to_best.get(name), ".2f") for name in RATIOS),
        " ".join(_number(to_uniform.get(name), ".2f") for name in ("forward", "backward")),
        " ".join(_host(row, phase) for phase in ("forward", "backward", "mask")),
        " ".join(_gibibytes(row, phase) for phase in ("forward", "backward")),
        _notes(row),
    ]
    return f"| {' | '.join(cells)} |"


def _notes(row: Row) -> str:
    """Join the phases that share a reason."""
    by_reason: dict[str, list[str]] = {}
    for phase, why in row.notes.items():
        by_reason.setdefault(why, []).append(phase)
    notes = [f"{', '.join(phases)}: {why}" for why, phases in by_reason.items()]
    if row.errors.get("out", 0) > _WORTH_SAYING:
        notes.append(f"error of out {row.errors['out']:.1%}")
    return "; ".join(notes).replace("|", "/")


def _milliseconds(row: Row, phase: str) -> str:
    timing = row.timing(phase)
    if timing is None:
        return _NONE
    return f"{timing.median_ms:.3f} ({timing.low_ms:.3f}-{timing.high_ms:.3f})"


def _host(row: Row, phase: str) -> str:
    timing = row.timing(phase)
    return _NONE if timing is None else f"{timing.host_ms:.2f}"


def _gibibytes(row: Row, phase: str) -> str:
    timing = row.timing(phase)
    return _NONE if timing is None else f"{timing.peak_bytes / 2**30:.2f}"


def _number(value: float | None, style: str) -> str:
    return _NONE if value is None else format(value, style)


def _entry(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    phases: dict[str, Any] = {}
    for phase, found in row.phases.items():
        known = {} if isinstance(found, str) else {**asdict(found), "tflops": row.tflops(phase)}
        phases[phase] = known or {"not_timed": found}
    return {
        "shape": asdict(row.shape),
        "case": row.case and asdict(row.case),
        "contestant": row.contestant,
        "density": row.density,
        "errors": row.errors,
        "phases": phases,
        "times_cudnn": ratios(row, rows, only_cudnn=True),
        "times_best_dense": ratios(row, rows, only_cudnn=False),
        "skewed_over_uniform": against_uniform(row, rows),
    }
