"""Tables and plot of benchmarks/estimators.py."""

from pathlib import Path
from typing import Any

from gossamer.train.study_output import Line, draw_lines, heading

SHOWN = {  # of the plot: colour and style
    "random, dropped": ("0.6", ":"),
    "mean-pool tiles, dropped": ("0.45", "-"),
    "SVG1 dropped": ("#b59a00", "-"),
    "SVG2 dropped": ("#c8500a", "-"),
    "SVG2 compensated": ("#a5488c", "-"),
    "EAR released score": ("#0a8f68", "-"),
    "EAR E^out": ("#0067a5", "-"),
    "EAR E^out, budget by layer": ("#6db9ef", "-"),
    "oracle mass, dropped": ("#c8500a", "--"),
    "oracle error, compensated": ("#0067a5", "--"),
}
SPREAD_AT = 0.1  # the density whose spread over problems is told


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of estimators.md."""
    densities = results["densities"]
    lines = ["# Attention error against density", ""]
    lines += [f"{heading(results['header'])} {results['seconds']:.0f} s.", ""]
    for data, found in results["data"].items():
        lines += [f"## {data}: {found['problems']} problems, {found['heads']} heads", ""]
        lines += ["Relative error of the output (root of the mean squared one), at density:", ""]
        lines += ["| method | " + " | ".join(f"{d:.0%}" for d in densities) + " |"]
        lines += ["|---" * (len(densities) + 1) + "|"]
        for name, rows in found["curves"].items():
            cells = (f"{r['output_error']:.4f} ({r['density']:.3f})" for r in rows)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", *_spread(found, densities)]
        lines += ["", "Mean squared error of the attention map, x 1e-6:", ""]
        lines += ["| method | " + " | ".join(f"{d:.0%}" for d in densities) + " |"]
        lines += ["|---" * (len(densities) + 1) + "|"]
        for name, rows in found["curves"].items():
            cells = (f"{r['map_error'] * 1e6:.3f}" for r in rows)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "Rank correlation of a block's score with its true error:", ""]
        lines += ["| score, blocks | within rows | within heads |", "|---|---|---|"]
        lines += [
            f"| {label} | {x['row']:.3f} | {x['head']:.3f} |"
            for label, x in found["correlations"].items()
        ]
        lines += ["", "EAR E^out at 10 % after cold rounds of k-means: "]
        lines[-1] += ", ".join(f"{n}: {x:.4f}" for n, x in found["rounds"].items()) + "."
        lines.append("")
    return "\n".join(lines)


def _spread(found: dict[str, Any], densities: list[float]) -> list[str]:
    """Return the output error of each noise level or seed, and its range over all problems."""
    at = min(range(len(densities)), key=lambda d: abs(densities[d] - SPREAD_AT))
    groups = list(dict.fromkeys(found["groups"]))
    lines = [
        f"The same at {densities[at]:.0%}, by noise level or seed, and from the least to the "
        "greatest of all problems (a problem is one layer at one level, or a seed):",
        "",
        f"| method | {' | '.join(groups)} | range |",
        "|---" * (len(groups) + 2) + "|",
    ]
    for name, rows in found["curves"].items():
        errors = rows[at]["by_problem"]
        cells = []
        for group in groups:
            own = [e**2 for e, g in zip(errors, found["groups"], strict=True) if g == group]
            cells.append(f"{(sum(own) / len(own)) ** 0.5:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {min(errors):.4f} to {max(errors):.4f} |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw output error against density, one panel for each data set."""
    panels = {}
    for data, found in results["data"].items():
        rows = {name: found["curves"][name] for name in SHOWN}
        panels[data] = {
            name: Line(
                [r["density"] for r in rows[name]],
                [r["output_error"] for r in rows[name]],
                colour=colour,
                style=style,
            )
            for name, (colour, style) in SHOWN.items()
        }
    draw_lines(path, panels, x="density", y="relative error of the output")
