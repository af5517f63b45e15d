"""What a sweep is asked for: how its jobs are started, and a config for each of them."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from gossamer.train.arms import choose_arms, load_arms, merge
from gossamer.train.config import compose, parse_overrides
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

_MAX_LABEL = 100


@dataclass(frozen=True)
class Launch:
    """How jobs are started: the keys sweep.*."""

    num_processes: int = 1  # of each job
    mixed_precision: Literal["no", "bf16"] = "no"
    arms: Any = None  # names of the recipe's arms, or all
    workers: int = 0  # processes that each do many jobs, one to a GPU; 0: a launch for each job
    time_limit: float | None = None  # seconds, after which jobs in hand stop and save; with workers
    grace: float = 120.0  # seconds that a job which is told to stop may take to save its step
    results: str | None = None  # a .jsonl file that keeps what each job found
    velocities: str | None = None  # a folder in which workers share the teacher's
    keep_checkpoints: bool = True  # false: delete those of a job whose results are kept


@dataclass(frozen=True)
class Job:
    """One combination: what was swept, and what the job is started with."""

    label: str
    swept: dict[str, Any]
    overrides: list[str]
    cfg: DictConfig

    @property
    def run_dir(self) -> Path:
        return Path(self.cfg.run_dir)


def split(overrides: Sequence[str]) -> tuple[Launch, list[Override], list[Override]]:
    """Part sweep.* from the swept and the constant overrides."""
    settings: dict[str, Any] = {}
    swept: list[Override] = []
    constant: list[Override] = []
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if key.startswith("sweep."):
            settings[key.removeprefix("sweep.")] = override.value()
        else:
            (swept if override.is_sweep_override() else constant).append(override)
    return _launch(settings), swept, constant


def _launch(settings: dict[str, Any]) -> Launch:
    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "num_processes": ("a whole number of at least 1", lambda x: _is_count(x, 1)),
        "mixed_precision": ("no, bf16", lambda x: x in ("no", "bf16")),
        "arms": ("all, or names of the recipe's arms", lambda x: isinstance(x, str | list)),
        "workers": ("a whole number of at least 0", lambda x: _is_count(x, 0)),
        "time_limit": ("seconds above 0", _is_seconds),
        "grace": ("seconds above 0", _is_seconds),
        "results": ("a path that ends in .jsonl", lambda x: str(x).endswith(".jsonl")),
        "velocities": ("a path", lambda x: isinstance(x, str)),
        "keep_checkpoints": ("true or false", lambda x: isinstance(x, bool)),
    }
    for name, value in settings.items():
        if name not in allowed:
            fix = nearest(name, allowed) or "remove it"
            raise Refusal(f"sweep.{name}", value, ", ".join(allowed), fix)
        words, is_allowed = allowed[name]
        if not is_allowed(value):
            raise Refusal(f"sweep.{name}", value, words, "give one value")
    launch = Launch(**settings)
    if launch.workers and launch.num_processes > 1:
        raise Refusal("sweep.workers", launch.workers, "0 with num_processes above 1", "give one")
    if launch.time_limit and not launch.workers:
        raise Refusal("sweep.time_limit", launch.time_limit, "nothing without workers", "workers=1")
    if launch.velocities and not launch.workers:
        raise Refusal("sweep.velocities", launch.velocities, "none without workers", "workers=1")
    if not launch.keep_checkpoints and not launch.results:
        raise Refusal("sweep.keep_checkpoints", False, "true without results", "give results")
    return launch


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def plan(
    swept: list[Override], constant: list[Override], arms: Any = None
) -> tuple[Path, list[Job]]:
    """Compose every job; all of them lie in the sweep's folder."""
    try:
        combinations = BasicSweeper.split_arguments(swept, None)[0] if swept else [()]
    except HydraException as error:
        raise Refusal(
            "sweep", swept[0].input_line, "lists, range() and glob()", str(error)
        ) from error
    if not swept and arms is None:
        raise Refusal("sweep", "nothing", "at least one a=1,2", "for example sparsity=0.8,0.9")
    if any(override.key_or_group == "name" for override in swept):
        raise Refusal("name", "several values", "one name", "each job's folder is named for it")
    given = {o.key_or_group: o.value() for o in constant}
    chosen: list[tuple[str | None, list[Override]]] = [(None, [])]
    if arms is not None:
        known = load_arms(str(given.get("recipes")))
        chosen = [*choose_arms(known, arms).items()]
    lines = _typed(constant)
    first = compose([*lines, *combinations[0]])
    recipe = "several" if any(o.key_or_group == "recipes" for o in swept) else first.recipe_name
    name = first.name if "name" in given else f"{recipe}-sweep"
    jobs: dict[str, Job] = {}
    for combination in combinations:  # outermost: a sweep cut short has every arm's first seed
        parsed = parse_overrides(combination)
        for arm, own in chosen:
            settled = {o.key_or_group for o in own}
            free = [
                line
                for line, override in zip(combination, parsed, strict=True)
                if override.key_or_group not in settled
            ]
            swept_here = _swept(free, arm)
            if _label_of(swept_here) not in jobs:  # arms that settle what is swept come once
                job = _job(name, _typed(merge(own, constant)), free, swept_here)
                jobs[job.label] = job
    if len({job.run_dir for job in jobs.values()}) < len(jobs):
        where = next(iter(jobs.values())).run_dir
        raise Refusal("run_dir", where, "one folder per job", "give runs_dir instead")
    return Path(first.runs_dir) / name, list(jobs.values())


def _swept(combination: Sequence[str], arm: str | None) -> dict[str, Any]:
    parsed = parse_overrides(combination) if combination else []
    swept: dict[str, Any] = {"arm": arm} if arm is not None else {}
    return swept | {o.key_or_group.replace("recipes", "recipe"): o.value() for o in parsed}


def _label_of(swept: dict[str, Any]) -> str:
    return _label(",".join(f"{key}={value}" for key, value in redact(swept).items()))


def _job(name: str, constant: list[str], combination: Sequence[str], swept: dict[str, Any]) -> Job:
    label = _label_of(swept)
    quoted = f"{name}/{label}".replace("'", "\\'")
    overrides = [*constant, *map(_as_typed, combination), f"name='{quoted}'"]
    return Job(label=label, swept=swept, overrides=overrides, cfg=compose(overrides))


def _typed(overrides: Sequence[Override]) -> list[str]:
    return [_as_typed(str(override.input_line)) for override in overrides]


def _as_typed(line: str) -> str:
    return re.sub(r"^\+recipes=", "recipe=", line)


def _label(text: str) -> str:
    """Make a folder name; one that had to be changed ends with a hash, so that it stays unique."""
    label = re.sub(r"[^\w.,=+-]", "_", text)[:_MAX_LABEL]
    return label if label == text else f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
