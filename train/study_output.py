"""What the studies leave: a table that says where it was measured, and a plot beside it."""

import argparse
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gossamer.train.files import write_atomic


def environment(command: str, commit: str, device: str | None = None) -> dict[str, str]:
    """Return what the figures depend on; the commit is found by git if it is not given.

    The device is the GPU if there is one, unless "cpu" is given.
    """
    is_gpu = torch.cuda.is_available() and device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit or _commit(),
        "date": str(date.today()),
        "command": command,
    }


def heading(header: Mapping[str, str]) -> str:
    """Return an environment as the line under a table's title."""
    said = ", ".join(f"{key} {value}" for key, value in header.items() if key != "command")
    return f"{said}. Command: `{header['command']}`."


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --out, --plot and --commit, which `leave` takes, to a study that prints its table."""
    parser.add_argument("--out", type=Path, default=None, help="write the table to this .md file")
    parser.add_argument("--plot", type=Path, default=None, help="its plot; beside it if left out")
    parser.add_argument("--commit", default="", help="of the code, where git cannot tell")


@dataclass(frozen=True)
class Line:
    """Points of one line of a plot, with what they range over, in a colour and a dash style."""

    x: Sequence[float]
    y: Sequence[float]
    spread: tuple[Sequence[float], Sequence[float]] | None = None  # lowest and highest y
    colour: str | None = None
    style: str = "-"


def leave(
    options: argparse.Namespace,
    title: str,
    header: Mapping[str, str],
    table: Sequence[str],
    panels: Mapping[str, Mapping[str, Line]],
    *,
    x: str,
    y: str,
) -> None:
    """Write the table and the plot of its lines where `add_output`'s options say; else nothing."""
    if options.out is None:
        return
    text = "\n".join([f"# {title}", "", heading(header), "", *table]) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, text)
    draw_lines(options.plot or options.out.with_suffix(".png"), panels, x=x, y=y)


def draw_lines(
    path: Path, panels: Mapping[str, Mapping[str, Line]], *, x: str, y: str, log: bool = True
) -> None:
    """Draw one panel for each title with a line for each label; the legend is that of the last."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels) + 2, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            drawn = axis.plot(
                line.x, line.y, line.style, color=line.colour, label=label, marker="o", markersize=3
            )
            if line.spread is not None:
                axis.fill_between(line.x, *line.spread, color=drawn[0].get_color(), alpha=0.12)
        axis.set(title=title, xlabel=x, ylabel=y, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    _save(figure, path)


def draw_bars(path: Path, rows: Mapping[str, Mapping[str, float]], *, x: str) -> None:
    """Draw one bar for each row, of its parts one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    start = dict.fromkeys(rows, 0.0)
    for part in next(iter(rows.values()), {}):
        widths = [parts[part] for parts in rows.values()]
        axis.barh(list(rows), widths, left=list(start.values()), label=part)
        start = {name: start[name] + parts[part] for name, parts in rows.items()}
    axis.invert_yaxis()
    axis.set(xlabel=x)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)  # type: ignore[attr-defined]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
