"""The values that each key of conf/config.yaml may take."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gossamer.train.condition import CONDITIONS
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

NULLABLE = ("sparsity",)  # keys that may be null though their default is not
EXTRA = ("vmaf", "flip")  # measures of sampled videos by programs that do not come with the package
STAGES = ("encode", "calibrate", "train", "evaluate", "export", "report")

_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "backend": ("auto", "reference", "triton", "hopper"),
    "resume": ("auto", "force", "never"),
    "lora.layers": ("attention", "linear"),
    "export.dtype": ("float32", "bfloat16"),
    "export.lora": ("merged", "adapter"),
    "data.condition": CONDITIONS,
    "model.condition": CONDITIONS,
}


Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a test
MOST = 2**31  # whole numbers are smaller: tensors have no more rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(low: int) -> Rule:
    def test(value: Any) -> bool:
        return isinstance(value, int) and _is_number(value) and low <= value < MOST

    return f"a whole number of at least {low} and below 2**31", test


def _null_or(rule: Rule) -> Rule:
    """Return the rule of a key that may be null; null says no type, so the rule has to."""
    words, test = rule
    return f"null or {words}", lambda value: value is None or test(value)


def _finite(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _all(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: len(values) > 0 and all(test(value) for value in values)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and 0 <= value < 2**32


def _is_run_name(value: str) -> bool:
    path = PurePath(value)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_curve(densities: Sequence[float]) -> bool:
    rises = all(a < b for a, b in pairwise(densities))
    return rises and len(densities) > 1 and densities[0] > 0 and densities[-1] <= 1


def _are_buckets(buckets: Sequence[Sequence[int]] | None) -> bool:
    if buckets is None:
        return True
    sizes, is_size = [tuple(bucket) for bucket in buckets], _whole(1)[1]
    whole = all(len(size) == 3 and all(map(is_size, size)) for size in sizes)
    return whole and 0 < len(sizes) == len(set(sizes))


_ABOVE_0: Rule = ("a finite number above 0", lambda x: _finite(x) and x > 0)
_SEED: Rule = ("a whole number from 0 to 2**32 - 1", _is_seed)
_TEXT: Rule = ("a text", lambda value: isinstance(value, str))
_GIVEN: Rule = ("a text", _null_or(_TEXT)[1])  # null here: still to be given
_RANGES: dict[str, Rule] = {
    "name": ("a relative folder name without ..", _is_run_name),
    "seed": _SEED,
    "repeat_seeds": (
        "a list of different seeds from 0 to 2**32 - 1",
        lambda seeds: all(_is_seed(seed) for seed in seeds) and len(set(seeds)) == len(seeds),
    ),
    "sparsity": (
        "a number in [0, 1): every query keeps at least one key block",
        lambda value: value is None or 0 <= value < 1,
    ),
    "error_budget": _null_or(_ABOVE_0),
    "steps": _whole(1),
    "batch_size": _whole(1),
    "grad_accumulation": _whole(1),
    "sequence_parallel": _whole(1),
    "optimizer.lr": _ABOVE_0,
    "optimizer.betas": (
        "two numbers in [0, 1)",
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
    ),
    "optimizer.weight_decay": ("a finite number of at least 0", _finite),
    "optimizer.warmup": _whole(0),
    "optimizer.final_lr": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
    "optimizer.clip": ("a number above 0 (.inf: no clipping)", lambda value: value > 0),
    "optimizer.mask_numbers": ("a finite number of at least 0", _finite),
    "optimizer.mask_matrices": ("a finite number of at least 0", _finite),
    "ema": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "num_workers": _whole(0),
    "log_every": _whole(1),
    "checkpoint_every": _whole(1),
    "keep_checkpoints": (
        "a whole number of at least 2: the newest may be damaged",
        lambda value: value >= 2,
    ),
    "max_skipped": _whole(0),
    "loss_spike": ("a number above 1 (.inf: none)", lambda value: value > 1),
    "lora.rank": _whole(0),
    "lora.alpha": _null_or(_ABOVE_0),
    "noise_draws": _whole(0),
    "guidance.scale": ("a finite number", math.isfinite),
    "guidance.negative_share": ("a number in [0, 1]", lambda share: 0 <= share <= 1),
    "teacher.check": _whole(0),
    "calibration.clips": _whole(1),
    "calibration.noise_levels": ("numbers in (0, 1]", _all(lambda t: 0 < t <= 1)),
    "calibration.densities": ("two or more rising numbers in (0, 1]", _is_curve),
    "calibration.probes": _whole(1),
    "calibration.path": _null_or(_TEXT),
    "calibration.seed": _null_or(_SEED),
    "training_data.clips": _null_or(_whole(1)),
    "training_data.dir": _null_or(_TEXT),
    "evaluation.clips": _whole(1),
    "evaluation.noise_levels": ("numbers in (0, 1]", _all(lambda t: 0 < t <= 1)),
    "evaluation.sample_clips": _whole(0),
    "evaluation.sample_steps": _whole(1),
    "evaluation.batch_size": _whole(1),
    "evaluation.kept_videos": _null_or(_whole(0)),
    "evaluation.extra": (f"some of {', '.join(EXTRA)}", lambda names: {*names} <= {*EXTRA}),
    "evaluation.every": _whole(0),
    "evaluation.every_clips": _whole(1),
    "data.height": _whole(1),
    "data.width": _whole(1),
    "data.frames": _whole(1),
    "data.buckets": ("null or a list of [frames, height, width]", _are_buckets),
    "data.dir": _null_or(_TEXT),
    "data.window": _null_or(_whole(1)),
    "data.cache_gb": _null_or(_ABOVE_0),
    "data.stride": _whole(1),
    "data.fps": _null_or(_ABOVE_0),
    "data.holdout": ("a number in [0, 1)", lambda share: 0 <= share < 1),
    "data.min_motion": ("a finite number of at least 0", _finite),
    "data.augment": _whole(0),
    "data.max_clips": _null_or(_whole(1)),
    "data.source": _GIVEN,
    "model.path": _GIVEN,
    "text.path": _GIVEN,
    "codec.path": _null_or(_TEXT),
    "teacher.path": _null_or(_TEXT),
}


def validate(cfg: DictConfig) -> None:
    """Refuse the first value that is out of its range; types were checked when it was composed."""
    for key, options in _CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not OmegaConf.is_missing(cfg, key) and value not in options:
            _refuse_choice(key, value, options)
    for key, (allowed, is_allowed) in _RANGES.items():
        if _is_present(cfg, key) and not _holds(is_allowed, OmegaConf.select(cfg, key)):
            raise Refusal(key, OmegaConf.select(cfg, key), allowed, f"give {key} such a value")
    if (cfg.sparsity is None) == (cfg.error_budget is None):
        both = "null" if cfg.sparsity is None else cfg.error_budget
        raise Refusal(
            "error_budget",
            both,
            "either sparsity or error_budget, the other null",
            "give e.g. sparsity=null error_budget=0.05",
        )
    _check_stages(cfg.stages)


def _check_stages(stages: Sequence[str]) -> None:
    for stage in stages:
        if stage not in STAGES:
            _refuse_choice("stages", stage, STAGES)
    if not stages or sorted(stages, key=STAGES.index) != list(dict.fromkeys(stages)):
        order = "[" + ",".join(STAGES) + "]"
        raise Refusal("stages", list(stages), f"some of {order}, in this order", "reorder them")


def _refuse_choice(key: str, value: object, options: Sequence[str]) -> None:
    fix = nearest(str(value), options) or f"give {key} one of them"
    raise Refusal(key, value, ", ".join(options), fix)


def _is_present(cfg: DictConfig, key: str) -> bool:
    """Tell whether the chosen options have this key; a data set of another kind may not."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, group) if group else cfg
    return isinstance(node, Mapping | DictConfig) and name in node


def _holds(is_allowed: Callable[[Any], bool], value: Any) -> bool:
    try:
        return is_allowed(value)
    except TypeError:
        return False
