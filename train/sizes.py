"""What a run takes on disk, told before it starts."""

import logging
from math import prod
from pathlib import Path
from shutil import disk_usage

import torch
from omegaconf import DictConfig

from gossamer.train.config import build
from gossamer.train.text import TextEncoder

log = logging.getLogger(__name__)

GB = 1e9


def checkpoint_size(cfg: DictConfig, trained: int) -> str:
    """Say what checkpoints take: fp32 weights, the optimizer's state and the averaged weights."""
    weights = torch.empty(trained, device="meta")
    state = build(cfg.optimizer).state_bytes(weights)
    size = (weights.nbytes * (2 if cfg.ema else 1) + state) / GB
    folder = Path(cfg.run_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = disk_usage(there).free / GB
    kept = cfg.keep_checkpoints + 1  # the newest is written before the oldest goes
    if size * kept > free:
        log.warning("%d checkpoints of %.1f GB need more than the %.1f GB free", kept, size, free)
    return f"{size:.2f} GB each, up to {kept} at once; {free:.0f} GB free"


def clip_size(cfg: DictConfig, latent: tuple[int, int, int, int], text: TextEncoder) -> str:
    """Say what one encoded clip takes, in bf16."""
    parts = 1 if cfg.data.condition == "none" else 2
    latents, words = 2 * parts * prod(latent) / 1e6, 2 * text.dim * text.length / 1e6
    return f"{latents:.3g} MB of latents, at most {words:.3g} MB of text"
