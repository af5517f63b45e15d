"""What calibration found, on disk and put into a model."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import attentions
from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal

CALIBRATION = "calibration.json"
FORMAT_VERSION = 2
SQUARED = ("output", "fisher", "velocity", "velocity_exact")  # measures whose errors are squares


@dataclass(frozen=True)
class Calibration:
    """What calibration found; lists are [layer][head], then what the comment names."""

    layers: list[str]
    num_heads: int
    noise_levels: list[float]
    target_density: float
    planned_density: float  # of the chosen masks on the calibration samples
    k: list[list[float]]
    p: list[list[float]]
    captured_mass: list[list[list[float]]]  # [noise level]
    measure: str | None  # what the errors are; None: none was measured
    error: list[list[list[float]]]  # [noise level], of the chosen masks, one head sparse at a time
    curve_densities: list[float]
    curve_error: list[list[list[list[float]]]]  # [noise level][density]
    chosen: dict[str, Any]  # what was derived from the one figure asked for, and what it does
    clips: int
    seconds: float
    map_bound: list[list[float]] = field(default_factory=list)  # [layer]: error, probe, spread
    layout_choice: list[list[int]] = field(default_factory=list)  # place in PerHead's names
    skip_below: list[list[float]] = field(default_factory=list)  # of a tuned second filter
    made_for: dict[str, Any] = field(default_factory=dict)  # what the masks were asked to be
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CALIBRATION, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Calibration":
        """Read what `save` wrote; Refusal when it cannot be read."""
        file = folder / CALIBRATION
        try:
            content = json.loads(file.read_text())
            version = content.get("format_version", 1)
            if version == FORMAT_VERSION:
                return cls(**content)
            reason = f"its format_version is {version}, this gossamer reads {FORMAT_VERSION}"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = str(error)
        raise Refusal(
            "calibration",
            file,
            "a calibration of this version of gossamer",
            f"delete it and run `gossamer calibrate`: {reason}",
        )

    def differs(self, asked: dict[str, Any]) -> str:
        """Name what was calibrated for other masks or another model; empty when it all fits."""
        made = self.made_for
        odd = [key for key in asked if made.get(key) != asked[key]]
        return ", ".join(f"{key}: {made.get(key)}, now {asked[key]}" for key in odd)

    def apply(self, model: nn.Module) -> None:
        """Set the budgets of an attached model; Refusal when it has other layers or heads."""
        found = attentions(model)
        heads = {attention.policy.k.numel() for attention in found.values()}
        if list(found) != self.layers or heads != {self.num_heads}:
            raise Refusal(
                "calibration",
                f"{len(self.layers)} layers of {self.num_heads} heads",
                f"a calibration of the model's {len(found)} layers of {max(heads)} heads",
                "run `gossamer calibrate` for this model",
            )
        limit = torch.tensor(self.skip_below) if self.skip_below else None
        k, p = torch.tensor(self.k), torch.tensor(self.p)
        try:
            set_masks(model, k, p, self.layout_choice, limit)
        except ValueError as error:  # somebody edited them
            fix = f"mend them, or delete the file and run `gossamer calibrate`: {error}"
            raise Refusal("calibration", CALIBRATION, "numbers that the masks take", fix) from error


def set_masks(
    model: nn.Module,
    k: Tensor,
    p: Tensor,
    layout_choice: list[list[int]],
    skip_below: Tensor | None = None,
) -> None:
    """Set k and p [L, H] of an attached model, and each head's order where its layout has some.

    `skip_below` [L, H] is the limit of compensation FilteredDrop, where it was tuned.
    """
    for index, attention in enumerate(attentions(model).values()):
        attention.policy.set_budget(k[index], p[index])
        if layout_choice:
            attention.layout.set_choice(torch.tensor(layout_choice[index]))
        if skip_below is not None:
            attention.compensation.set_limit(skip_below[index])
