"""`gossamer bench`: measures, and writes the results anew after every row."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gossamer.benchmarks.contestants import CONTESTANTS
from gossamer.benchmarks.run import Row, Runner
from gossamer.benchmarks.settings import RESULTS, describe, parse
from gossamer.benchmarks.table import as_json, markdown
from gossamer.benchmarks.timing import CudaStopwatch
from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal
from gossamer.train.study_output import environment

log = logging.getLogger(__name__)


def bench(arguments: Sequence[str], *, only_show: bool = False) -> int:
    """Measure what the key=value arguments select; return the exit code."""
    settings = parse(arguments)
    if only_show:
        sys.stdout.write(describe(settings))
        return 0
    if not torch.cuda.is_available():
        raise Refusal("device", "cpu", "cuda", "bench needs a GPU")
    folder = settings.folder()
    contestants = [CONTESTANTS[name] for name in settings.contestant]
    runner = Runner(
        settings, contestants, CudaStopwatch(), device=torch.device("cuda"), dtype=torch.bfloat16
    )
    command = shlex.join(["gossamer", "bench", *arguments])
    record(runner, folder, environment(command, settings.commit))
    sys.stdout.write((folder / RESULTS[0]).read_text())
    return 0


def record(
    runner: Runner, folder: Path, header: dict[str, str], now: Callable[[], float] = time.monotonic
) -> list[Row]:
    """Run to the end and keep results.md and results.json up to date with every row."""
    start = now()
    rows: list[Row] = []

    def write() -> None:
        ended = f", {runner.stopped}" if runner.stopped else ""
        progress = f"{len(rows)} of {runner.num_rows} rows in {now() - start:.0f} s{ended}."
        for name, render in zip(RESULTS, (markdown, as_json), strict=True):
            write_atomic(folder / name, render(rows, header, progress))

    write()
    for row in runner.rows():
        rows.append(row)
        write()
        log.info("%d/%d %s", len(rows), runner.num_rows, _summary(row))
    write()
    log.info("results in %s%s", folder, f" ({runner.stopped})" if runner.stopped else "")
    return rows


def _summary(row: Row) -> str:
    """Return a row in one line of progress."""
    case = row.case
    name = f"{case.block[0]}x{case.block[1]} {case.sparsity:.0%} {case.rows} " if case else ""
    timings = ((phase, row.timing(phase)) for phase in row.phases)
    times = [f"{phase} {timing.median_ms:.3f}" for phase, timing in timings if timing]
    return f"{row.shape.name} {name}{row.contestant}: {', '.join(times)} ms {row.notes or ''}"
