"""`gossamer sweep`: a job for each combination of values and each arm of a study, then one table.

Each job is an `accelerate launch` of its own, or, with sweep.workers, one of many that a process
does (train/workers.py).
"""

import csv
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.types import Override
from tqdm import tqdm

from gossamer.train import workers
from gossamer.train.config import build, fingerprint, require_complete
from gossamer.train.files import write_atomic
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.run_dir import RESULT, STARTS, check_run_dir
from gossamer.train.study.record import MADE_WITH, Results, differing
from gossamer.train.sweep_plan import Job, Launch, plan, split
from gossamer.train.workers import KILLED, Pool, Task, sharing

log = logging.getLogger(__name__)

LOG = "log.txt"
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?(error: |[\w.]*(Error|Exception|Interrupt)\b)")
_LAUNCHERS_ERROR = re.compile(r"CalledProcessError|ChildFailedError")
STOPPED = (130, 143, KILLED)  # exit codes of a worker's job that was told to stop


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
    launch, swept, constant = split(overrides)
    is_shared_out = bool(launch.workers) and not only_show
    # the workers import while the jobs are planned
    options = launch.workers, launch.mixed_precision, launch.velocities, launch.grace
    with Pool(*options) if is_shared_out else nullcontext() as pool:
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
    folder, jobs = plan(swept, constant, launch.arms)
    if only_show:
        lines = (f"gossamer train {' '.join(job.overrides)}\n" for job in jobs)
        sys.stdout.write("".join(lines))
        return 0
    results = Results(Path(launch.results)) if launch.results else None
    made_with = {job.label: _made_with(job, launch) for job in jobs}
    skipped = (_skipped(job, folder, results, made_with[job.label]) for job in jobs)
    outcomes = {outcome.job: outcome for outcome in skipped if outcome}
    todo = [job for job in jobs if job.label not in outcomes]
    _check(todo, launch, made_with)
    folder.mkdir(parents=True, exist_ok=True)
    deadline = None if launch.time_limit is None else start + launch.time_limit
    ended = (
        _one_by_one(todo, launch, folder)
        if pool is None
        else _share_out(todo, pool, folder, deadline, launch.grace)
    )
    with tqdm(total=len(jobs), initial=len(outcomes), desc="sweep", unit="job") as bar:
        for job, outcome in ended:
            bar.update()
            bar.set_postfix_str(job.label)
            if outcome.status == "finished" and results is not None:
                outcome = _kept(job, outcome, results, launch)
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
    else:
        shutil.rmtree(folder / STARTS, ignore_errors=True)
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


def _check(jobs: Sequence[Job], launch: Launch, made_with: Mapping[str, dict[str, str]]) -> None:
    from gossamer.train.check import preflight

    for job in tqdm(jobs, desc="check", unit="job", leave=False):
        require_complete(job.cfg)
        stages = list(job.cfg.stages)
        if launch.results and "evaluate" not in stages:
            fix = "add evaluate, or leave out sweep.results"
            raise Refusal("stages", stages, "stages with evaluate for sweep.results", fix)
        preflight(job.cfg, stages, precision=launch.mixed_precision)
        check_run_dir(job.cfg, job.run_dir)  # two calls whose jobs have the same labels
        earlier, own = _result(job), made_with[job.label]
        for key in differing(earlier, own) if job.cfg.resume != "force" else ():
            allowed = f"{earlier[key]}, as in {job.run_dir}"
            fix = f"set name=NEW, or resume=force to go on with the new {MADE_WITH[key]}"
            raise Refusal(key, own[key], allowed, fix)


def _one_by_one(jobs: Sequence[Job], launch: Launch, folder: Path) -> Iterator[tuple[Job, Outcome]]:
    """Start an `accelerate launch` for each job, and say how it went."""
    for job in jobs:
        begun = time.monotonic()
        job.run_dir.mkdir(parents=True, exist_ok=True)
        log_file = job.run_dir / LOG
        before = log_file.stat().st_size if log_file.is_file() else 0
        with log_file.open("ab") as stream:
            code = workers.launch(launch_command(launch, job.overrides), stream, launch.grace)
        yield job, _ended(job, folder, code, time.monotonic() - begun, before)


def _share_out(
    jobs: Sequence[Job], pool: Pool, folder: Path, deadline: float | None, grace: float
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
            lost = "its steps since the last checkpoint are lost"
            error = f"killed after {grace:g} s of grace: {lost}" if done.code == KILLED else ""
            yield job, _entry(job, folder, "stopped", round(done.seconds, 1), error=error)
            continue
        yield job, _ended(job, folder, done.code, done.seconds, before[job.label])


def _kept(job: Job, outcome: Outcome, results: Results, launch: Launch) -> Outcome:
    """Add a finished job to the results; one that cannot be added has failed."""
    try:
        results.add(
            job.label,
            redact(job.swept),
            job.cfg,
            outcome.seconds,
            sharing=sharing(launch.workers or 1),
        )
    except Exception as error:  # whatever a job left behind, the next one is another matter
        said = " ".join(f"{type(error).__name__} {error}".split())
        return replace(outcome, status="failed", error=redact(f"not in sweep.results: {said}"))
    if not launch.keep_checkpoints:
        for seed_dir in (job.run_dir, *job.run_dir.glob("repeats/*")):
            shutil.rmtree(seed_dir / "checkpoints", ignore_errors=True)
    return outcome


def _ended(job: Job, folder: Path, code: int, seconds: float, log_start: int) -> Outcome:
    seconds = round(seconds, 1)
    if code != 0:
        said = (job.run_dir / LOG).read_bytes()[log_start:].decode("utf-8", "replace")
        error = f"exit code {code}: {_last_error(said)}"
        return _entry(job, folder, "failed", seconds, error=error)
    return _entry(job, folder, "finished", seconds, _result(job).get("metrics"))


def _skipped(
    job: Job, folder: Path, results: Results | None, made_with: dict[str, str]
) -> Outcome | None:
    """Return the outcome of a job that an earlier call finished, else None."""
    found = _finished(job, made_with) if results is None else results.metrics_of(job.cfg, made_with)
    return None if found is None else _entry(job, folder, "skipped", None, found)


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


def _made_with(job: Job, launch: Launch) -> dict[str, str]:
    return {"mixed_precision": launch.mixed_precision, "weights": build(job.cfg.model).stamp()}


def _finished(job: Job, made_with: dict[str, str]) -> dict[str, Any] | None:
    """Return the metrics of a job that finished with the same config, else nothing."""
    result = _result(job)
    same = result.get("config_fingerprint") == fingerprint(job.cfg)
    same = same and not differing(result, made_with)
    return result.get("metrics", {}) if same and result.get("finished") else None


def _result(job: Job) -> dict[str, Any]:
    path = job.run_dir / RESULT
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


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
