"""`gossamer sweep`: a job for each combination of values and each arm of a study, then one table.

Each job is an `accelerate launch` of its own, or, with sweep.workers, one of many that a process
does (train/workers.py).
"""

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from tqdm import tqdm

from gossamer.train.arms import choose_arms, load_arms, merge
from gossamer.train.config import compose, fingerprint, parse_overrides, require_complete
from gossamer.train.files import write_atomic
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.run_dir import check_run_dir
from gossamer.train.study.record import Results
from gossamer.train.suggest import nearest
from gossamer.train.workers import Pool, Task, own_environment, sharing

log = logging.getLogger(__name__)

RESULT, LOG = "result.json", "log.txt"
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception|Interrupt)\b)")
_LAUNCHERS_ERROR = re.compile(r"CalledProcessError|ChildFailedError")
_MAX_LABEL = 100
STOPPED = (130, 143)  # exit codes of a worker's job that was told to stop


@dataclass(frozen=True)
class Launch:
    """How jobs are started: the keys sweep.*."""

    num_processes: int = 1  # of each job
    mixed_precision: Literal["no", "bf16"] = "no"
    arms: Any = None  # names of the recipe's arms, or all
    workers: int = 0  # processes that each do many jobs, one to a GPU; 0: a launch for each job
    time_limit: float | None = None  # seconds, after which jobs in hand stop and save; with workers
    results: str | None = None  # a .jsonl file that keeps what each job found
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


@dataclass(frozen=True)
class Outcome:
    """One entry of summary.json; run_dir is seen from the sweep's folder."""

    job: str
    overrides: dict[str, Any]
    status: Literal["finished", "skipped", "failed", "stopped", "left"]
    run_dir: str
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def sweep(overrides: Sequence[str], *, only_show: bool = False) -> int:
    """Run every combination of `key=a,b`; return 1 if any job failed, else 0.

    All configs are composed and checked before the first job starts. Jobs that an earlier call
    finished with the same config are skipped, and one that fails does not stop the others. A time
    limit stops the jobs in hand, which go on where they were in the next call.
    """
    start = time.monotonic()
    launch, swept, constant = _split(overrides)
    is_shared_out = bool(launch.workers) and not only_show
    # the workers import while the jobs are planned
    with Pool(launch.workers, launch.mixed_precision) if is_shared_out else nullcontext() as pool:
        return _sweep(launch, swept, constant, start, pool, only_show=only_show)


def _sweep(
    launch: Launch,
    swept: list[Override],
    constant: list[Override],
    start: float,
    pool: Pool | None,
    *,
    only_show: bool,
) -> int:
    folder, jobs = _plan(swept, constant, launch.arms)
    if only_show:
        lines = (f"gossamer train {' '.join(job.overrides)}\n" for job in jobs)
        sys.stdout.write("".join(lines))
        return 0
    results = Results(Path(launch.results)) if launch.results else None
    outcomes = {job.label: skipped for job in jobs if (skipped := _skipped(job, folder, results))}
    todo = [job for job in jobs if job.label not in outcomes]
    _check(todo, launch.mixed_precision)
    folder.mkdir(parents=True, exist_ok=True)
    deadline = None if launch.time_limit is None else start + launch.time_limit
    ended = (
        _one_by_one(todo, launch, folder)
        if pool is None
        else _share_out(todo, pool, folder, deadline)
    )
    with tqdm(total=len(jobs), initial=len(outcomes), desc="sweep", unit="job") as bar:
        for job, outcome in ended:
            bar.update()
            bar.set_postfix_str(job.label)
            if outcome.status == "finished" and results is not None:
                shared = sharing(launch.workers or 1)
                results.add(job.label, redact(job.swept), job.cfg, outcome.seconds, shared)
                if not launch.keep_checkpoints:
                    for seed_dir in (job.run_dir, *job.run_dir.glob("repeats/*")):
                        shutil.rmtree(seed_dir / "checkpoints", ignore_errors=True)
            outcomes[job.label] = outcome
            _write_summary(folder, [outcomes[j.label] for j in jobs if j.label in outcomes])
            log.info("%s: %s %s", job.label, outcome.status, outcome.error)
    left = [_entry(job, folder, "left") for job in jobs if job.label not in outcomes]
    outcomes |= {outcome.job: outcome for outcome in left}
    _write_summary(folder, [outcomes[job.label] for job in jobs])
    from gossamer.train.report import sweep_report

    log.info("summary %s, report %s", folder / "summary.csv", sweep_report(folder))
    again = [o.job for o in outcomes.values() if o.status in ("left", "stopped")]
    if again:
        log.info("%d of %d jobs are left; the same command goes on", len(again), len(jobs))
    return int(any(outcome.status == "failed" for outcome in outcomes.values()))


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
    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "num_processes": ("a whole number of at least 1", lambda x: _is_count(x, 1)),
        "mixed_precision": ("no, bf16", lambda x: x in ("no", "bf16")),
        "arms": ("all, or names of the recipe's arms", lambda x: isinstance(x, str | list)),
        "workers": ("a whole number of at least 0", lambda x: _is_count(x, 0)),
        "time_limit": ("seconds above 0", lambda x: isinstance(x, int | float) and x > 0),
        "results": ("a path that ends in .jsonl", lambda x: str(x).endswith(".jsonl")),
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
    if not launch.keep_checkpoints and not launch.results:
        raise Refusal("sweep.keep_checkpoints", False, "true without results", "give results")
    return launch


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _plan(
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


def _check(jobs: Sequence[Job], mixed_precision: str) -> None:
    from gossamer.train.check import preflight

    for job in tqdm(jobs, desc="check", unit="job", leave=False):
        require_complete(job.cfg)
        preflight(job.cfg, list(job.cfg.stages), precision=mixed_precision)
        check_run_dir(job.cfg, job.run_dir)  # two calls whose jobs have the same labels


def _one_by_one(jobs: Sequence[Job], launch: Launch, folder: Path) -> Iterator[tuple[Job, Outcome]]:
    """Start an `accelerate launch` for each job, and say how it went."""
    environment = own_environment()
    for job in jobs:
        begun = time.monotonic()
        job.run_dir.mkdir(parents=True, exist_ok=True)
        log_file = job.run_dir / LOG
        before = log_file.stat().st_size if log_file.is_file() else 0
        with log_file.open("ab") as stream:
            code = subprocess.run(
                launch_command(launch, job.overrides),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            ).returncode
        yield job, _ended(job, folder, code, time.monotonic() - begun, before)


def _share_out(
    jobs: Sequence[Job], pool: Pool, folder: Path, deadline: float | None
) -> Iterator[tuple[Job, Outcome]]:
    """Let workers do the jobs until the time is out, and say how each went."""
    if not jobs:
        return
    known: dict[str, Job] = {job.label: job for job in jobs}
    tasks, before = [], {}
    for job in jobs:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        log_file = job.run_dir / LOG
        before[job.label] = log_file.stat().st_size if log_file.is_file() else 0
        tasks.append(Task(job.label, job.overrides, log_file))
    for done in pool.run(tasks, deadline):
        job = known[done.task.name]
        if done.code in STOPPED:
            yield job, _entry(job, folder, "stopped", round(done.seconds, 1))
            continue
        yield job, _ended(job, folder, done.code, done.seconds, before[job.label])


def _ended(job: Job, folder: Path, code: int, seconds: float, log_start: int) -> Outcome:
    seconds = round(seconds, 1)
    if code != 0:
        said = (job.run_dir / LOG).read_bytes()[log_start:].decode("utf-8", "replace")
        error = f"exit code {code}: {_last_error(said)}"
        return _entry(job, folder, "failed", seconds, error=error)
    return _entry(job, folder, "finished", seconds, _finished(job) or {})


def _skipped(job: Job, folder: Path, results: Results | None) -> Outcome | None:
    """Return the outcome of a job that an earlier call finished, else None."""
    metrics = results.metrics_of(job.cfg) if results is not None else _finished(job)
    return None if metrics is None else _entry(job, folder, "skipped", None, metrics)


def _entry(
    job: Job,
    folder: Path,
    status: Literal["finished", "skipped", "failed", "stopped", "left"],
    seconds: float | None = None,
    metrics: dict[str, Any] | None = None,
    error: str = "",
) -> Outcome:
    run_dir = os.path.relpath(job.run_dir, folder)
    return Outcome(
        job.label, redact(job.swept), status, run_dir, seconds, dict(metrics or {}), error
    )


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
