"""The plots of a report: each function draws one figure in the colours of a theme.

matplotlib is imported when a plot is drawn, without pyplot, so no state outlives a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from gossamer.train.reporting.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

WIDTH = 8.0  # inches
MAX_NUMBERED_CELLS = 96
LABEL_WIDTH, LABEL_HEIGHT = 120.0, 10.0  # points that the label of a point may take


def training(
    theme: Theme, curves: Mapping[str, Mapping[str, Array]], columns: Mapping[str, str]
) -> Figure:
    """Draw columns {field: title} of the metrics over the steps, one line a seed."""
    num_rows = -(-len(columns) // 2)
    figure = _figure(WIDTH, 3.4 if num_rows == 1 else 2.3 * num_rows)
    grid = figure.subplots(num_rows, min(len(columns), 2), squeeze=False).flat
    for axes, (field, title) in zip(grid, columns.items(), strict=False):
        _over_steps(
            axes, theme, {seed: (rows["step"], rows[field]) for seed, rows in curves.items()}
        )
        axes.set(title=title, xlabel="step")
    for axes in list(grid)[len(columns) :]:
        axes.set_visible(False)
    figure.axes[0].legend(loc="best")
    return figure


def per_noise_level(
    theme: Theme,
    noise_levels: Array,
    lines: Mapping[str, tuple[Array, Array]],
    *,
    title: str,
    unit: str,
) -> Figure:
    """Draw up to two lines {label: (mean [T], spread [T])} over the noise levels."""
    figure = _figure(WIDTH, 3.6)
    axes = figure.subplots()
    colours = (theme.before, theme.after)
    for (label, (mean, spread)), colour, mark in zip(lines.items(), colours, "so", strict=False):
        bars = spread if np.any(spread > 0) else None
        axes.errorbar(
            noise_levels, mean, bars, label=label, color=colour, marker=mark, capsize=4, lw=1.8
        )
    axes.set(
        title=title,
        xlabel="noise level (0 = clean video, 1 = pure noise)",
        ylabel=unit,
        xticks=noise_levels if len(noise_levels) <= 12 else noise_levels[:: len(noise_levels) // 8],
    )
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()
    return figure


def clips(theme: Theme, before: Array, after: Array, spread: Array) -> Figure:
    """Draw each clip's error before [N] against after [N] with its spread over seeds [N]."""
    figure = _figure(5.6, 5.0)
    axes = figure.subplots()
    high = 1.12 * max(before.max(), (after + spread).max())
    low = 0.85 * min(before.min(), (after - spread).min())
    axes.plot([low, high], [low, high], color=theme.ink, lw=1, ls="--", label="no change")
    axes.fill_between([low, high], [low, high], low, color=theme.after, alpha=0.08, lw=0)
    bars = spread if np.any(spread > 0) else None
    axes.errorbar(
        before, after, bars, fmt="o", color=theme.after, capsize=3, ms=6, label="one clip"
    )
    axes.set(
        title="Each held-out clip",
        xlabel="relative velocity error before distillation",
        ylabel="after distillation",
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
    )
    axes.text(high, low, "better after \n", ha="right", va="bottom", color=theme.after)
    axes.grid()
    axes.legend(loc="upper left")
    return figure


def heat_maps(
    theme: Theme,
    panels: Mapping[str, Array],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    axis: str,
    unit: str,
) -> Figure:
    """Draw up to two matrices {title: [R, C]} on one colour scale."""
    height = min(1.5 + 0.3 * len(rows), 7.0)
    figure = _figure(WIDTH if len(panels) > 1 else 5.0, height)
    low = min(float(matrix.min()) for matrix in panels.values())
    high = max(float(matrix.max()) for matrix in panels.values())
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, matrix) in zip(grid, panels.items(), strict=True):
        shown = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set(title=title, xlabel=axis)
        shown_columns = _places(columns, 16)
        axes.set_xticks(shown_columns, [columns[place] for place in shown_columns])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if matrix.size <= MAX_NUMBERED_CELLS:
            _number_cells(axes, matrix, (low + high) / 2)
    shown_rows = _places(rows, 24)
    grid[0].set_yticks(shown_rows, [rows[place] for place in shown_rows])
    figure.colorbar(shown, ax=list(grid), label=unit, fraction=0.05, pad=0.02, aspect=5 * height)
    return figure


def calibration_curves(
    theme: Theme, densities: Array, error: Array, target: float, *, unit: str
) -> Figure:
    """Draw each head's error [L, H, D] over the density [D], coloured by layer."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    figure = _figure(WIDTH, 4.0)
    axes = figure.subplots()
    num_layers = len(error)
    # The ends of the map would vanish on dark or on light paper.
    shades = ListedColormap(colormaps["viridis"](np.linspace(0.2, 0.85, num_layers)))
    for layer, heads in enumerate(np.where(error > 0, error, np.nan)):
        for head in heads:
            axes.plot(densities, head, color=shades(layer), lw=1.1, alpha=0.85)
    axes.axvline(target, color=theme.before, ls="--", lw=1.4, label=f"target density {target:.3g}")
    axes.set(
        title="Error when only one head is sparse",
        xlabel="density of that head (share of blocks computed exactly)",
        ylabel=unit,
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(densities, [f"{density:.3g}" for density in densities])
    axes.minorticks_off()
    axes.grid()
    axes.legend()
    colours = ScalarMappable(Normalize(-0.5, num_layers - 0.5), shades)
    figure.colorbar(colours, ax=axes, label="layer", pad=0.02, ticks=MaxNLocator(integer=True))
    return figure


def pareto(
    theme: Theme,
    before: tuple[Array, Array],
    after: tuple[Array, Array],
    front: tuple[Array, Array],
    labels: Sequence[str],
    *,
    gain: str,
) -> Figure:
    """Draw (gain, error) of each job before and after, the front of the latter, and labels."""
    figure = _figure(WIDTH, 4.8)
    axes = figure.subplots()
    for start, end in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        axes.plot(*zip(start, end, strict=True), color=theme.grid, lw=1, zorder=1)
    axes.plot(*front, color=theme.after, lw=1.8, label="Pareto front after distillation", zorder=2)
    axes.plot(*before, "s", mfc="none", color=theme.before, label="before distillation", ms=6)
    axes.plot(*after, "o", color=theme.after, label="after distillation", ms=7)
    axes.set(
        title="Lower and further right is better",
        xlabel=gain,
        ylabel="relative velocity error",
    )
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.2 * (right - left))  # room for labels
    axes.set_ylim(bottom=0)
    axes.grid()
    axes.legend(loc="best")
    _label_points(figure, axes, theme, after, labels)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _over_steps(axes: Axes, theme: Theme, curves: Mapping[str, tuple[Array, Array]]) -> None:
    """Draw raw values faint below their centred running mean, on a log scale where they span it."""
    for colour, (seed, (step, value)) in zip(cycle(theme.lines), curves.items(), strict=False):
        window = max(len(value) // 30, 1)
        mean = np.convolve(value, np.full(window, 1 / window), mode="valid")
        middle = step[(window - 1) // 2 :][: len(mean)]
        axes.plot(step, value, color=colour, lw=1, alpha=0.3)
        axes.plot(middle, mean, color=colour, lw=1.8, label=seed)
    values = np.concatenate([value for _, value in curves.values()])
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid()


def _places(labels: Sequence[str], most: int) -> list[int]:
    """Return which labels to show so that there are no more than `most`, evenly spaced."""
    return list(range(0, len(labels), -(-len(labels) // most)))


def _number_cells(axes: Axes, matrix: Array, middle: float) -> None:
    for row, column in np.ndindex(*matrix.shape):
        value = matrix[row, column]
        colour = "#14171a" if value > middle else "#ffffff"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _label_points(
    figure: Figure, axes: Axes, theme: Theme, points: tuple[Array, Array], labels: Sequence[str]
) -> None:
    """Write each label below right of its point, moved down where it would cover another."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()
    places = axes.transData.transform(np.stack(points, axis=-1)) * 72 / figure.dpi  # points
    written: list[tuple[float, float]] = []
    for index in np.argsort(-places[:, 1]):
        left, height = places[index]
        for other_left, other_height in written:
            if abs(left - other_left) < LABEL_WIDTH:
                height = min(height, other_height - LABEL_HEIGHT)
        written.append((left, height))
        axes.annotate(
            labels[index],
            (points[0][index], points[1][index]),
            xytext=(6, height - places[index, 1] - 8),
            textcoords="offset points",
            va="center",
            fontsize=8,
            path_effects=[withStroke(linewidth=3, foreground=theme.paper)],
        )
