"""Can this machine, model and config run? Answered from config files, before any weight is read."""

import logging
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from gossamer.sparse.attach import check_shared_sequence, family_of
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.sparse.layout import TokenGrid
from gossamer.train.check_data import check_data, check_training_data
from gossamer.train.check_masks import check_masks, is_sparse
from gossamer.train.check_teacher import check_teacher
from gossamer.train.config import build, require_complete
from gossamer.train.data.settings import buckets_of
from gossamer.train.launch import Launch
from gossamer.train.loop import TrainSettings
from gossamer.train.match_density import check_match
from gossamer.train.memory import GIB, Memory, Split, advice, estimate, estimate_calibration
from gossamer.train.model import ModelSource
from gossamer.train.parallel import check_sequence
from gossamer.train.quality import check_extra
from gossamer.train.refusal import Refusal
from gossamer.train.sizes import checkpoint_size, clip_size
from gossamer.train.text import HashedWords, TextEncoder

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> dict[str, Any]:
    """Refuse a run that cannot work and return the facts of one that can."""
    facts = preflight(cfg, list(cfg.stages), plan_memory=True)
    for name, value in facts.items():
        log.info("%-12s %s", name, f"{value:,}" if isinstance(value, int) else value)
    log.info("check passed")
    return facts


def preflight(
    cfg: DictConfig,
    stages: list[str],
    *,
    plan_memory: bool = False,
    precision: str | None = None,
) -> dict[str, Any]:
    """Check device, model, codec, text, data, grid, mask and backend of the stages that will run.

    Returns what the run will be as readable facts; counts are ints. `plan_memory` adds what the
    calibration and a training step take on a GPU, which needs some seconds. `precision` is the
    mixed precision of another process that will run it; None: of this one.
    """
    require_complete(cfg)
    device = check_device(cfg.device)
    launch = Launch.read()
    facts: dict[str, Any] = {"device": device}
    if stages == ["report"]:
        return facts
    build(cfg.noise)
    source: ModelSource = build(cfg.model)
    model = source.skeleton()
    source.check_weights()
    codec, text = build(cfg.codec), build(cfg.text)
    settings = check_data(cfg, stages, codec, text, source.condition)
    check_training_data(cfg)
    _check_compile(cfg)
    check_extra(list(cfg.evaluation.extra))
    latents = [codec.latent_shape(*size) for size in buckets_of(settings)]
    latent = max(latents, key=prod)
    _check_channels(model, latent[0], source.condition)
    _check_text(model, text)
    grids = [_grid(model, shape) for shape in latents]
    grid = grids[latents.index(latent)]
    facts |= _model_facts(source, model, grid)
    if len(grids) > 1:
        facts["buckets"] = ", ".join(f"{g.frames} x {g.height} x {g.width}" for g in grids)
    dtype = attention_dtype(precision)
    facts["precision"] = str(dtype).removeprefix("torch.")
    if is_sparse(cfg):
        found = [check_masks(cfg, model, each, dtype, device) for each in grids]
        facts |= found[grids.index(grid)]
        check_match(cfg)
    if cfg.seed in cfg.repeat_seeds:
        fix = "they come after it"
        raise Refusal("repeat_seeds", list(cfg.repeat_seeds), f"other seeds than {cfg.seed}", fix)
    facts |= check_teacher(cfg, stages, model, latent)
    sizes = latent, (text.length, text.dim)
    if plan_memory and "calibrate" in stages and is_sparse(cfg) and cfg.calibration.path is None:
        plan = partial(estimate_calibration, cfg, *sizes, dtype=dtype)
        facts["calibration"] = _planned("calibrate", cfg, plan, device)
    if "train" in stages:
        _check_backward(cfg)
        build(cfg.optimizer).check()
        build(cfg.tracker).check()
        _check_sequence(cfg, model, grids, launch)
        facts["batch"] = _batch(cfg, launch)
        if plan_memory:
            facts["memory"] = _planned(
                "train", cfg, partial(_step, cfg, sizes, dtype, launch), device
            )
        facts["checkpoint"] = checkpoint_size(cfg, facts["trained"])
    if "encode" in stages and "source" in cfg.data:
        facts["clip"] = clip_size(cfg, latent, text)
    if "export" in stages:
        _check_export(source, text)
    return facts


def check_launch(cfg: DictConfig) -> None:
    """Refuse a launch that accelerate, which comes next, would take as another or fail at."""
    require_complete(cfg)
    check_device(cfg.device)
    Launch.read()
    attention_dtype()


def check_device(device: str) -> torch.device:
    """Return the device that the config means; refuse cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal(
            "device", "cuda", "cpu or auto on this machine (no CUDA device)", "device=cpu"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def attention_dtype(precision: str | None = None) -> torch.dtype:
    """Return the dtype of q, k and v: what accelerate's mixed precision gives them."""
    from accelerate.utils import parse_choice_from_env

    if precision is None:
        precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise Refusal(
            "mixed_precision", precision, "no or bf16", "accelerate launch --mixed_precision bf16"
        )
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _check_compile(cfg: DictConfig) -> None:
    if cfg.compile_tuned and not cfg.compile:
        allowed = "false where compile is false"
        raise Refusal("compile_tuned", "true", allowed, "set compile=true too")


def _check_channels(model: nn.Module, channels: int, condition: str) -> None:
    expected = channels * (1 if condition == "none" else 2)
    takes, gives = model.config.in_channels, model.config.out_channels
    if takes != expected or gives != channels:
        raise Refusal(
            "codec.channels",
            channels,
            f"a codec whose latents give the model's {takes} input and {gives} output channels "
            f"(model.condition={condition} gives {expected} and {channels})",
            "choose the codec that the model was trained with",
        )


def _check_text(model: nn.Module, text: TextEncoder) -> None:
    if model.config.text_dim != text.dim:
        raise Refusal(
            "text.dim",
            text.dim,
            f"{model.config.text_dim}, the model's text_dim",
            "choose the text encoder that the model was trained with",
        )


def _grid(model: nn.Module, latent: tuple[int, int, int, int]) -> TokenGrid:
    """Return the token grid of latents [C, f, h, w]; refuse sizes that the model cannot patch."""
    config: Any = model.config
    for name, size, patch in zip(
        ("frames", "height", "width"), latent[1:], config.patch_size, strict=True
    ):
        if size % patch:
            raise Refusal(
                f"data.{name}",
                f"{size} latents",
                f"a number of latents that the model's patch of {patch} divides",
                "change the clip size",
            )
        if size // patch > config.rope_max_seq_len:
            raise Refusal(
                f"data.{name}",
                f"{size // patch} tokens",
                f"at most the model's {config.rope_max_seq_len} positions",
                "make the clip smaller",
            )
    call = {"hidden_states": torch.empty(1, *latent, device="meta")}
    return family_of(model).token_grid(model, call)


def _model_facts(source: ModelSource, model: nn.Module, grid: TokenGrid) -> dict[str, Any]:
    layers = list(family_of(model).self_attentions(model))
    heads, width = layers[0][1].heads, model.config.attention_head_dim
    return {
        "model": source.path or type(source).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": f"{len(layers)} layers of {heads} heads, {width} wide",
        "tokens": grid.num_tokens,
        "grid": f"{grid.frames} x {grid.height} x {grid.width}",
    }


def _check_sequence(
    cfg: DictConfig, model: nn.Module, grids: list[TokenGrid], launch: Launch
) -> None:
    """Refuse processes, heads and tokens that do not divide into the groups asked for."""
    size = cfg.sequence_parallel
    check_sequence(size, launch.processes)
    heads = next(layer.heads for _, layer in family_of(model).self_attentions(model))
    try:
        check_shared_sequence(model, size, heads, cfg.policy)
    except ValueError as error:
        raise Refusal("sequence_parallel", size, "a size for this model", str(error)) from error
    if cfg.evaluation.every and max(size, launch.shard) > 1:
        raise Refusal(
            "evaluation.every",
            cfg.evaluation.every,
            "0 where processes share a model",
            "set it to 0, or launch without FSDP and sequence_parallel",
        )
    for grid in grids:
        if grid.num_tokens % size:
            raise Refusal(
                "sequence_parallel",
                size,
                f"a divisor of the {grid.num_tokens} tokens",
                "set it to 1, or change the clip size",
            )


def _batch(cfg: DictConfig, launch: Launch) -> str:
    """Say how a batch is split; refuse one that does not divide over the processes."""
    parts, per_sample = cfg.grad_accumulation, cfg.sequence_parallel
    groups, clips = _shares(cfg, launch)
    shared = f" (each of {per_sample} processes)" if per_sample > 1 else ""
    shards = f"; weights in {launch.shard} shards" if launch.shard > 1 else ""
    split = f"processes {groups}{shared} x parts {parts} x {clips} at once"
    return f"{cfg.batch_size} clips = {split}{shards}"


def _shares(cfg: DictConfig, launch: Launch) -> tuple[int, int]:
    """Return how many groups of processes share a batch, and the clips of one forward in each."""
    groups = launch.processes // cfg.sequence_parallel
    parts = cfg.grad_accumulation
    settings = TrainSettings(steps=cfg.steps, batch_size=cfg.batch_size, grad_accumulation=parts)
    return groups, settings.micro_batch(groups)


def _step(
    cfg: DictConfig,
    sizes: tuple[tuple[int, int, int, int], tuple[int, int]],
    dtype: torch.dtype,
    launch: Launch,
) -> Memory:
    """Return what a training step takes in each process."""
    split = Split(
        replicas=launch.processes,
        shards=launch.shard,
        sequence=cfg.sequence_parallel,
        teacher_sharded=launch.shard > 1,
    )
    return estimate(cfg, *sizes, dtype=dtype, clips=_shares(cfg, launch)[1]).divided(split)


def _planned(stage: str, cfg: DictConfig, plan: Callable[[], Memory], device: torch.device) -> str:
    """Say what a stage takes on a GPU; warn where this one has less.

    Compiled blocks that keep their activations keep fewer than the plan counts.
    """
    is_most = stage == "train" and cfg.compile and not cfg.gradient_checkpointing
    try:
        needed = plan()
    except ValueError as error:  # no GPU's kernel takes this method
        return f"not estimated: {error}"
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if needed.total > there:
            log.warning(
                "%s needs %s %.1f GiB and the GPU has %.1f; try %s",
                "a training step" if stage == "train" else "the calibration",
                "at most" if is_most else "about",
                needed.total / GIB,
                there / GIB,
                advice(cfg, stage),
            )
    return f"at most {needed} (compiled blocks keep less)" if is_most else str(needed)


def _check_backward(cfg: DictConfig) -> None:
    if is_sparse(cfg) and isinstance(build(cfg.compensation), FilteredDrop):
        allowed = "another one where a student is trained: it has no backward"
        fix = "set compensation=drop, or leave train out of stages"
        raise Refusal("compensation", "filtered_drop", allowed, fix)


def _check_export(source: ModelSource, text: TextEncoder) -> None:
    """Refuse what could not be exported after hours: no pipeline to put the transformer into."""
    if source.pipeline is None and not isinstance(text, HashedWords):
        raise Refusal(
            "model.path",
            source.path,
            "a whole pipeline folder (transformer/, vae/, ...), whose other parts the export takes",
            "give that folder, or leave export out of stages",
        )
