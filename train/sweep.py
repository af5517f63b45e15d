"""`gossamer sweep`: one `accelerate launch` for each combination of values, then one table."""

import csv
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from tqdm import tqdm

from gossamer.train.config import compose, fingerprint, parse_overrides, require_complete
from gossamer.train.files import write_atomic
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

log = logging.getLogger(__name__)

RESULT, LOG = "result.json", "log.txt"
# Set by a launcher for its own children; a job of the sweep is nobody's child.
_LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_\w+|TORCHELASTIC_\w+")
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception|Interrupt)\b)")
_LAUNCHERS_ERROR = re.compile(r"CalledProcessError|ChildFailedError")
_MAX_LABEL = 100


@dataclass(frozen=True)
class Launch:
    """How `accelerate launch` starts each job: the keys sweep.*."""

    num_processes: int = 1
    mixed_precision: Literal["no", "bf16"] = "no"


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


@dataclass(frozen=True)
class Outcome:
    """One entry of summary.json; run_dir is seen from the sweep's folder."""

    job: str
    overrides: dict[str, Any]
    status: Literal["finished", "skipped", "failed"]
    run_dir: str
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def sweep(overrides: Sequence[str], *, only_show: bool = False) -> int:
    """Run every combination of `key=a,b`; return 1 if any job failed, else 0.

    All configs are composed and checked before the first job starts. Jobs that an earlier call
    finished with the same config are skipped, and one that fails does not stop the others.
    """
    launch, swept, constant = _split(overrides)
    folder, jobs = _plan(swept, constant)
    if only_show:
        lines = (f"gossamer train {' '.join(job.overrides)}\n" for job in jobs)
        sys.stdout.write("".join(lines))
        return 0
    _check(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for job in (bar := tqdm(jobs, desc="sweep", unit="job")):
        bar.set_postfix_str(job.label)
        outcomes.append(_outcome(job, launch, folder))
        _write_summary(folder, outcomes)
        log.info("%s: %s %s", job.label, outcomes[-1].status, outcomes[-1].error)
    from gossamer.train.report import sweep_report

    log.info("summary %s, report %s", folder / "summary.csv", sweep_report(folder))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def launch_command(launch: Launch, overrides: Sequence[str]) -> list[str]:
    """Return the `accelerate launch` of one job."""
    options = ["--num_processes", str(launch.num_processes), "--num_machines", "1"]
    options += ["--mixed_precision", launch.mixed_precision, "--dynamo_backend", "no"]
    threads = max(1, (os.cpu_count() or 1) // launch.num_processes)  # accelerate's default is 1
    options += ["--num_cpu_threads_per_process", str(threads)]
    if launch.num_processes > 1:
        # Without --multi_gpu accelerate starts one process on a CPU, silently.
        options += ["--multi_gpu", "--main_process_port", "0"]
    module = ["-m", "gossamer.train", *overrides]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *module]


def _split(overrides: Sequence[str]) -> tuple[Launch, list[Override], list[Override]]:
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
    allowed = {"num_processes": "a whole number of at least 1", "mixed_precision": "no, bf16"}
    for name, value in settings.items():
        if name not in allowed:
            fix = nearest(name, allowed) or "remove it"
            raise Refusal(f"sweep.{name}", value, ", ".join(allowed), fix)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (is_count if name == "num_processes" else value in ("no", "bf16")):
            raise Refusal(f"sweep.{name}", value, allowed[name], "give one value")
    return Launch(**settings)


def _plan(swept: list[Override], constant: list[Override]) -> tuple[Path, list[Job]]:
    """Compose every job; all of them lie in the sweep's folder."""
    try:
        combinations = BasicSweeper.split_arguments(swept, None)[0] if swept else []
    except HydraException as error:
        raise Refusal(
            "sweep", swept[0].input_line, "lists, range() and glob()", str(error)
        ) from error
    if not combinations:
        raise Refusal("sweep", "nothing", "at least one a=1,2", "for example sparsity=0.8,0.9")
    if any(override.key_or_group == "name" for override in swept):
        raise Refusal("name", "several values", "one name", "each job's folder is named for it")
    lines = [_as_typed(str(override.input_line)) for override in constant]
    first = compose([*lines, *combinations[0]])
    is_named = any(override.key_or_group == "name" for override in constant)
    recipe = "several" if any(o.key_or_group == "recipes" for o in swept) else first.recipe_name
    name = first.name if is_named else f"{recipe}-sweep"
    jobs = [_job(name, lines, combination) for combination in combinations]
    if len({job.run_dir for job in jobs}) < len(jobs):
        raise Refusal("run_dir", jobs[0].run_dir, "one folder per job", "give runs_dir instead")
    return Path(first.runs_dir) / name, jobs


def _job(name: str, constant: list[str], combination: Sequence[str]) -> Job:
    parsed = parse_overrides(combination)
    swept = {o.key_or_group.replace("recipes", "recipe"): o.value() for o in parsed}
    label = _label(",".join(f"{key}={value}" for key, value in redact(swept).items()))
    quoted = f"{name}/{label}".replace("'", "\\'")
    overrides = [*constant, *map(_as_typed, combination), f"name='{quoted}'"]
    return Job(label=label, swept=swept, overrides=overrides, cfg=compose(overrides))


def _as_typed(line: str) -> str:
    return re.sub(r"^\+recipes=", "recipe=", line)


def _label(text: str) -> str:
    """Make a folder name; one that had to be changed ends with a hash, so that it stays unique."""
    label = re.sub(r"[^\w.,=+-]", "_", text)[:_MAX_LABEL]
    return label if label == text else f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _check(jobs: Sequence[Job]) -> None:
    from gossamer.train.check import preflight

    for job in tqdm(jobs, desc="check", unit="job", leave=False):
        require_complete(job.cfg)
        preflight(job.cfg, list(job.cfg.stages))


def _outcome(job: Job, launch: Launch, folder: Path) -> Outcome:
    """Run one job, unless it is finished, and say how it went."""
    start, run_dir = time.monotonic(), os.path.relpath(job.run_dir, folder)
    entry = {"job": job.label, "overrides": redact(job.swept), "run_dir": run_dir}
    if (metrics := _finished(job)) is not None:
        return Outcome(status="skipped", metrics=metrics, **entry)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    environment = {name: v for name, v in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    with (job.run_dir / LOG).open("a+b") as stream:
        before = stream.tell()
        code = subprocess.run(
            launch_command(launch, job.overrides),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        ).returncode
        stream.seek(before)
        said = stream.read().decode("utf-8", "replace")
    seconds = round(time.monotonic() - start, 1)
    if code != 0:
        error = f"exit code {code}: {_last_error(said)}"
        return Outcome(status="failed", seconds=seconds, error=error, **entry)
    return Outcome(status="finished", seconds=seconds, metrics=_finished(job) or {}, **entry)


def _finished(job: Job) -> dict[str, Any] | None:
    """Return the metrics of a job that finished with the same config, else nothing."""
    path = job.run_dir / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same = result.get("config_fingerprint") == fingerprint(job.cfg)
    return result.get("metrics", {}) if same and result.get("finished") else None


def _last_error(said: str) -> str:
    """Find the line of a log that says what went wrong; launchers only add that a child failed."""
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) and not _LAUNCHERS_ERROR.search(line)]
    return (errors or lines or ["no output"])[-1]


def _write_summary(folder: Path, outcomes: Sequence[Outcome]) -> None:
    rows = [asdict(outcome) for outcome in outcomes]
    write_atomic(folder / "summary.json", json.dumps(rows, indent=2) + "\n")
    flat = [
        {
            **{name: value for name, value in row.items() if not isinstance(value, dict)},
            **row["overrides"],
            **row["metrics"],
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(folder / "summary.csv", text.getvalue())
