"""Tables and plot of benchmarks/estimators.py."""

from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of estimators.md."""
    densities = results["densities"]
    lines = ["# Attention error against density", "", f"`{results['command']}`", ""]
    lines += [f"{results['machine']}. {results['seconds']:.0f} s.", ""]
    for data, found in results["data"].items():
        lines += [f"## {data}: {found['problems']} problems, {found['heads']} heads", ""]
        lines += ["Relative error of the output (root of the mean squared one), at density:", ""]
        lines += ["| method | " + " | ".join(f"{d:.0%}" for d in densities) + " |"]
        lines += ["|---" * (len(densities) + 1) + "|"]
        for name, rows in found["curves"].items():
            cells = (f"{r['output_error']:.4f} ({r['density']:.3f})" for r in rows)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
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


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw output error against density, one panel for each data set."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = {
        "random, dropped": ("0.6", ":"),
        "mean-pool tiles, dropped": ("0.45", "-"),
        "SVG2 dropped": ("#c8500a", "-"),
        "SVG2 compensated": ("#a5488c", "-"),
        "EAR released score": ("#0a8f68", "-"),
        "EAR E^out": ("#0067a5", "-"),
        "EAR E^out, budget by layer": ("#6db9ef", "-"),
        "oracle mass, dropped": ("#c8500a", "--"),
        "oracle error, compensated": ("#0067a5", "--"),
    }
    panels = results["data"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels) + 2, 4), squeeze=False, layout="constrained"
    )
    for axis, (data, found) in zip(axes[0], panels.items(), strict=True):
        for name, (colour, style) in shown.items():
            rows = found["curves"][name]
            x, y = [r["density"] for r in rows], [r["output_error"] for r in rows]
            axis.plot(x, y, style, color=colour, label=name, marker="o", markersize=3)
        axis.set(title=data, xlabel="density", ylabel="relative error of the output", yscale="log")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
