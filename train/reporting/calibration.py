"""The plots that calibration leaves beside its file: each head at each noise level."""

from functools import partial
from pathlib import Path

import numpy as np

from gossamer.train.calibration import SQUARED, Calibration
from gossamer.train.reporting import plots, theme

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
