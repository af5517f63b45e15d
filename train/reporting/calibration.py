"""What calibration tells: each head at each noise level, in lines and plots, and its reasons."""

from functools import partial
from pathlib import Path

import numpy as np

from gossamer.train.calibration import SQUARED, Calibration
from gossamer.train.reporting import plots, theme
from gossamer.train.reporting.reasons import reasons

ERRORS = {
    "mass": "attention mass that is lost",
    "relative_l1": "relative L1 error of the head's output",
    "output": "relative error of the layer's output",
    "fisher": "change of the flow-matching loss (root of the diagonal Fisher form)",
    "velocity": "relative velocity error (to first order)",
    "velocity_exact": "relative velocity error",
}


def draw(found: Calibration, folder: Path) -> None:
    """Write mass.png and, where an error was measured, error.png into the folder."""
    values = {"mass": ("captured attention mass", np.asarray(found.captured_mass))}
    if found.measure is not None:
        error = np.asarray(found.error)
        squared = found.measure in SQUARED
        values["error"] = ERRORS[found.measure], np.sqrt(error) if squared else error
    for name, (unit, by_level) in values.items():
        figure = partial(
            plots.heat_maps,
            panels={"By layer.head": by_level.reshape(-1, len(found.noise_levels))},
            rows=[f"{layer}.{head}" for layer, head in np.ndindex(by_level.shape[:2])],
            columns=[f"{level:.3g}" for level in found.noise_levels],
            axis="noise level",
            unit=unit,
        )
        theme.write(folder / f"{name}.png", figure)


def lines(found: Calibration) -> list[str]:
    """Return what calibration prints: a table of all heads, Proposition 1 by layer, its reasons."""
    return [*_heads(found), *_bounds(found), *reasons(found)]


def _heads(found: Calibration) -> list[str]:
    """Return captured mass and error of each head by noise level, with its budget."""
    levels = "".join(f"  t={level:<6.3g}" for level in found.noise_levels)
    titles = ["captured attention mass"]
    values = [np.asarray(found.captured_mass)]
    if found.measure is not None:
        error = np.asarray(found.error)
        titles.append(ERRORS[found.measure])
        values.append(np.sqrt(error) if found.measure in SQUARED else error)
    width = max(len(layer) for layer in found.layers) + len(f" head {found.num_heads}")
    said = []
    for title, of_title in zip(titles, values, strict=True):
        said.append(f"{title} of each head by noise level:")
        said.append(f"{'':{width}}{levels}  k")
        for layer, head in np.ndindex(of_title.shape[:2]):
            row = "".join(f"  {x:<8.3g}" for x in of_title[layer, head])
            name = f"{found.layers[layer]} head {head}"
            said.append(f"{name:{width}}{row}  {found.k[layer][head]:.4g}")
    return said


def _bounds(found: Calibration) -> list[str]:
    if not found.map_bound:
        return []
    said = [
        "mean squared error of the attention map with centroids, and its bound (SVG-EAR, "
        "Proposition 1: the probe's term + the queries' spread), by layer, means over heads; "
        "on the first clip of each level and a few q blocks of each head:"
    ]
    for layer, (error, probe, spread) in zip(found.layers, found.map_bound, strict=True):
        bound = probe + spread
        said.append(f"{layer}: {error:.3g} of at most {bound:.3g} ({probe:.3g} + {spread:.3g})")
    return said
