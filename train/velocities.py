"""The velocity cache: a dense teacher's velocities of fixed draws, on disk.

One safetensors file holds some clips, `<index>` -> bf16 [draws, C, f, h, w]; noise is not stored,
its seed is. A manifest with what the velocities were made for and each file's SHA-256 comes last.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from gossamer.train.config import data_dir, fingerprint
from gossamer.train.data.dataset import collate
from gossamer.train.data.shards import MANIFEST as DATA_MANIFEST
from gossamer.train.draws import DRAW_SEED, Draws
from gossamer.train.files import sha256
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal
from gossamer.train.weights import digest

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

MANIFEST = "velocities.json"
FORMAT_VERSION = 1
SPLIT = "train"
ROUNDING = 2**-8  # bf16 has 8 significant bits: |stored - v| <= 2^-8 |v|, element by element
# how far the same teacher may be from itself on another machine, relative to ||v||
SLACK = {"no": 1e-3, "bf16": 2e-2}
AGAIN = "run `gossamer encode` with the same settings, or set teacher.path=NEW_FOLDER"


@dataclass(frozen=True)
class VelocityManifest:
    """What a finished cache was made for, and its files."""

    request: dict[str, Any]  # teacher, data, noise, draws, guidance: what decides a velocity
    precision: str  # accelerate's mixed precision when they were made: no or bf16
    clips: int
    files: dict[str, str]  # name -> SHA-256
    dtype: str = "bfloat16"
    format_version: int = FORMAT_VERSION


def cache_dir(cfg: DictConfig) -> Path:
    """Return a folder of the encoded data, named by what decides the velocities."""
    keys = ["model", "noise", "noise_draws", "guidance"]
    return data_dir(cfg) / f"velocities-{fingerprint(cfg, keys)[:8]}"


def request_of(cfg: DictConfig) -> dict[str, Any]:
    """Return what decides the velocities of a config, but for the teacher's weights."""
    return {
        "data": sha256(data_dir(cfg) / DATA_MANIFEST),
        "split": SPLIT,
        "noise": OmegaConf.to_container(cfg.noise, resolve=True),
        "draws": cfg.noise_draws,
        "draw_seed": DRAW_SEED,
        "guidance": OmegaConf.to_container(cfg.guidance, resolve=True),
    }


class VelocityCache:
    """A finished cache, opened for reading."""

    def __init__(self, folder: Path, manifest: VelocityManifest) -> None:
        self.folder, self.manifest = folder, manifest
        names = sorted(manifest.files)
        self._file_of = {clip: name for name in names for clip in clips_of(name)}
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest; Refusal where there is none or it is of another version."""
        file = folder / MANIFEST
        if not file.is_file():
            fix = "run `gossamer encode` with the same settings first"
            raise Refusal("teacher.path", folder, f"a velocity cache with {MANIFEST}", fix)
        try:
            values = json.loads(file.read_text())
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"it is of format {values['format_version']}")
            return cls(folder, VelocityManifest(**values))
        except (ValueError, KeyError, TypeError) as error:
            allowed = f"a manifest of format {FORMAT_VERSION}"
            raise Refusal("teacher.path", file, allowed, f"{AGAIN}: {error}") from error

    def read(self, indices: list[int], draws: list[int]) -> Tensor:
        """Return the velocities [B, C, f, h, w] of clips and their draws, fp32 on the CPU."""
        rows = [
            self._handle(self._file_of[index]).get_slice(str(index))[draw]
            for index, draw in zip(indices, draws, strict=True)
        ]
        return torch.stack(rows).float()

    def refuse_other(self, asked: dict[str, Any]) -> None:
        """Refuse where the cache was made for something else than asked, by the first key."""
        made = self.manifest.request
        for key, value in asked.items():
            if made.get(key) != value:
                allowed = f"a cache of this run ({key} there: {made.get(key)}, now: {value})"
                raise Refusal("teacher.path", self.folder, allowed, AGAIN)

    def verify(self, job: "Job", samples: int) -> None:
        """Refuse a cache of another run, damaged files, or velocities that the teacher denies.

        `samples` of them are computed again, in the precision that the cache was made in.
        """
        self.refuse_other(request_of(job.cfg))
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != expected:
                raise Refusal(
                    "teacher.path", path, "a file as the manifest lists it", f"delete it; {AGAIN}"
                )
        teacher = job.dense_on_cpu()
        self.refuse_other({"teacher": digest(teacher)})
        if samples:
            self._compare(job, teacher.to(job.device), samples)

    def _compare(self, job: "Job", teacher: nn.Module, samples: int) -> None:
        model, dataset, draws = job.guided(teacher), job.dataset(SPLIT), job.draws(job.cfg.seed)
        bf16 = self.manifest.precision == "bf16"
        allowed, worst = ROUNDING + SLACK[self.manifest.precision], 0.0
        for number in range(samples):
            clip = (2 * number + 1) * len(dataset) // (2 * samples)
            draw = number % job.cfg.noise_draws
            with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
                (live,) = velocities_of(model, draws, collate([dataset[clip]]), draw, job.device)
            error = float((self.read([clip], [draw])[0] - live).norm() / live.norm())
            worst = max(worst, error)
            if not error <= allowed:
                raise Refusal(
                    "teacher.path",
                    self.folder,
                    f"velocities within {allowed:.2g} of a live teacher's (draw {draw} of clip "
                    f"{clip} is off by {error:.2g})",
                    f"delete the folder; {AGAIN}",
                )
        log.info("velocity cache %s: %d checked, off by %.2g at most", self.folder, samples, worst)

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


@torch.no_grad()
def velocities_of(
    model: nn.Module, draws: Draws, batch: dict[str, Tensor], draw: int, device: torch.device
) -> Tensor:
    """Return the model's velocities [B, C, f, h, w] of one draw of each clip, fp32 on the CPU."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    noised = draws.fixed(batch, [draw] * len(batch["index"]))
    return velocity(model, noised.x, noised.t, noised.text, noised.condition).cpu()


def name_of(clips: range) -> str:
    """Return the name of the file that holds these clips."""
    return f"clips-{clips.start:07d}-{clips.stop:07d}.safetensors"


def clips_of(name: str) -> range:
    """Return the clips of a file by its name."""
    first, last = name.removesuffix(".safetensors").split("-")[1:]
    return range(int(first), int(last))
