"""What calibration found, on disk and put into a model."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.sparse.attach import attentions, mask_parameters
from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal

CALIBRATION = "calibration.json"


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
    curve_densities: list[float]
    curve_error: list[list[list[float]]]  # [density]: squared relative velocity error
    clips: int
    seconds: float
    made_for: dict[str, Any] = field(default_factory=dict)  # what the masks were asked to be

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CALIBRATION, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Calibration":
        """Read what `save` wrote; Refusal when it cannot be read."""
        file = folder / CALIBRATION
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise Refusal(
                "calibration",
                file,
                "a calibration of this version of gossamer",
                f"delete it and run `gossamer calibrate`: {error}",
            ) from error

    def differs(self, asked: dict[str, Any]) -> str:
        """Name what was calibrated for other masks or another model; empty when it all fits."""
        made = self.made_for
        odd = [key for key in asked if made.get(key) != asked[key]]
        return ", ".join(f"{key}: {made.get(key)}, now {asked[key]}" for key in odd)

    def table(self) -> list[str]:
        """Return lines: captured attention mass of each layer by noise level, its heads' range."""
        levels = "  ".join(f"t={t:g}" for t in self.noise_levels)
        lines = [f"captured attention mass by layer: {levels}  (lowest and highest head)"]
        for layer, mass in zip(self.layers, torch.tensor(self.captured_mass), strict=True):
            by_level = "  ".join(f"{m:.3f}" for m in mass.mean(0).tolist())
            heads = mass.mean(1)
            lines.append(f"{layer}: {by_level}  ({heads.min():.3f} to {heads.max():.3f})")
        return lines

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
        for attention, k, p in zip(found.values(), self.k, self.p, strict=True):
            attention.policy.set_budget(torch.tensor(k), torch.tensor(p))


def weights_digest(model: nn.Module) -> str:
    """Return a short hash of a model's vectors (norms and biases), which tells weights apart."""
    digest = hashlib.sha256()
    masks = set(mask_parameters(model).values())
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1 and parameter not in masks:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
