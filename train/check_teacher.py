"""Do teacher, loss, adapters and draws of a config fit each other? Reads no weights."""

from math import prod
from typing import Any

from omegaconf import DictConfig
from torch import nn

from gossamer.train.config import build
from gossamer.train.lora import check_peft, count_parameters
from gossamer.train.refusal import Refusal
from gossamer.train.teacher import Cached, Frozen, Shared
from gossamer.train.velocities import VelocityCache, request_of


def check_teacher(
    cfg: DictConfig, stages: list[str], model: nn.Module, latent: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Refuse what does not fit; return how the teacher is held and how many parameters train."""
    teacher, loss = build(cfg.teacher), build(cfg.loss)
    kind = type(teacher).__name__.lower()
    if not loss.needs_teacher:
        _check_no_teacher(cfg, kind, loss.name, is_default=type(teacher) is Frozen)
    trained = sum(p.numel() for p in model.parameters())
    if cfg.lora.rank:
        check_peft(cfg.lora.rank)
        trained = count_parameters(model, cfg.lora)
    elif isinstance(teacher, Shared):
        raise Refusal(
            "teacher",
            kind,
            "frozen, offloaded or cached where all weights train (lora.rank=0)",
            "set lora.rank, e.g. 64",
        )
    if "export" in stages and cfg.export.lora == "adapter":
        _check_adapter_export(cfg)
    facts: dict[str, Any] = {"trained": trained}
    if loss.needs_teacher:
        facts["teacher"] = kind
    if isinstance(teacher, Cached):
        if not cfg.noise_draws:
            fix = "set noise_draws, e.g. 16: each clip is then seen with 16 noises"
            raise Refusal("noise_draws", 0, "1 or more with teacher=cached", fix)
        folder = teacher.folder(cfg)
        size = 2 * cfg.noise_draws * prod(latent) / 1e6
        facts["teacher"] = f"{cfg.noise_draws} velocities a clip, {size:.3g} MB, in {folder}"
        if "train" in stages and "encode" not in stages:
            VelocityCache.open(folder).refuse_other(request_of(cfg))
    return facts


def _check_no_teacher(cfg: DictConfig, kind: str, loss: str, *, is_default: bool) -> None:
    if not is_default:
        fix = "set teacher=frozen, which loads nothing here"
        raise Refusal("teacher", kind, f"frozen with loss={loss}, which needs none", fix)
    if cfg.guidance.scale != 1:
        allowed = f"1 with loss={loss}, which has no teacher to guide"
        raise Refusal("guidance.scale", cfg.guidance.scale, allowed, "set it to 1")


def _check_adapter_export(cfg: DictConfig) -> None:
    if not cfg.lora.rank:
        fix = "set export.lora=merged"
        raise Refusal("export.lora", "adapter", "merged where all weights train", fix)
    if "path" not in cfg.model:
        allowed = "merged where the model has no folder that the adapter could be loaded onto"
        raise Refusal("export.lora", "adapter", allowed, "set export.lora=merged")
