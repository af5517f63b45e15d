"""Can this machine, model and config run? Answered from config files, before any weight is read."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from gossamer.sparse.attach import method_from_spec
from gossamer.sparse.attention import check_backend, resolve_backend
from gossamer.sparse.layout import TokenGrid
from gossamer.train.config import build, data_dir, require_complete
from gossamer.train.data.shards import MANIFEST
from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> dict[str, Any]:
    """Refuse a run that cannot work and return the facts of one that can."""
    facts = preflight(cfg, list(cfg.stages))
    for name, value in facts.items():
        log.info("%s: %s", name, value)
    log.info("check passed")
    return facts


def preflight(cfg: DictConfig, stages: list[str]) -> dict[str, Any]:
    """Check device, model, codec, data, grid, mask and backend of the stages that will run."""
    require_complete(cfg)
    device = check_device(cfg.device)
    facts: dict[str, Any] = {"device": device}
    if stages == ["report"]:
        return facts
    folder = data_dir(cfg)
    manifest = folder / MANIFEST
    if "encode" in stages:
        if not manifest.is_file() and not Path(cfg.data.source).exists():
            raise Refusal(
                "data.source",
                cfg.data.source,
                "a video file, a folder of videos or a list file",
                "correct the path",
            )
    elif not manifest.is_file():
        raise Refusal("data.dir", folder, f"a folder with {MANIFEST}", "run gossamer encode first")
    source = build(cfg.model)
    model = source.config()
    source.check_weights()
    facts["model"] = getattr(source, "path", type(source).__name__)
    latent = _latent_shape(cfg)
    _check_channels(model, latent[0], source.condition)
    grid = _grid(model, latent)
    facts["tokens"] = grid.num_tokens
    if cfg.sparsity > 0:
        facts |= _check_sparsity(cfg, model, grid, device)
    return facts


def check_device(device: str) -> torch.device:
    """Return the device that the config means; refuse cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            "device", "cuda", "cpu or auto on this machine (no CUDA device)", "device=cpu"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _latent_shape(cfg: DictConfig) -> tuple[int, int, int, int]:
    codec = build(cfg.codec)
    data = cfg.data
    return codec.latent_shape(data.frames, data.height, data.width)


def _check_channels(model: dict[str, Any], channels: int, condition: str) -> None:
    expected = channels * (2 if condition == "first_frame" else 1)
    if model["in_channels"] != expected:
        raise Refusal(
            "codec.channels",
            channels,
            f"a codec whose latents give the model's {model['in_channels']} input channels "
            f"(model.condition={condition} gives {expected})",
            "choose the codec that the model was trained with",
        )


def _grid(model: dict[str, Any], latent: tuple[int, int, int, int]) -> TokenGrid:
    sizes = []
    for name, size, patch in zip(
        ("frames", "height", "width"), latent[1:], model["patch_size"], strict=True
    ):
        if size % patch:
            raise Refusal(
                f"data.{name}",
                size,
                f"latents divisible by the model's patch of {patch}",
                "change the clip size",
            )
        sizes.append(size // patch)
    return TokenGrid(*sizes)


def _check_sparsity(
    cfg: DictConfig, model: dict[str, Any], grid: TokenGrid, device: torch.device
) -> dict[str, Any]:
    spec = {n: build(cfg[n]) for n in ("layout", "estimator", "policy", "compensation")}
    method = method_from_spec({**spec, "backend": cfg.backend})
    _, kv_layout = method.layout.build(grid)  # type: ignore[attr-defined]
    num_blocks = kv_layout.num_blocks
    most = 1 - 1 / num_blocks
    if cfg.sparsity > most + 1e-9:
        raise Refusal(
            "sparsity",
            cfg.sparsity,
            f"at most {most:.4f} ({num_blocks} blocks a row, one must stay)",
            "lower sparsity, or make the layout's blocks smaller",
        )
    try:
        check_backend(
            method, head_dim=model["attention_head_dim"], dtype=torch.float32, device=device
        )
    except ValueError as error:
        raise Refusal("backend", cfg.backend, "a backend that can run this", str(error)) from error
    return {
        "backend": resolve_backend(cfg.backend, device),
        "blocks": f"{num_blocks} of at most {method.layout.block_shape[1]} tokens",
        "sparsity": cfg.sparsity,
    }
