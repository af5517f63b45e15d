"""Sweeps check every job first, skip finished ones and survive failing ones."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.train import sweep as module
from gossamer.train import workers
from gossamer.train.config import compose, fingerprint, save_config
from gossamer.train.refusal import Refusal
from gossamer.train.run_dir import CONFIG
from gossamer.train.sweep import launch_command, sweep
from gossamer.train.sweep_plan import Launch

JOB = """
import os, sys

name, sparsity, folder, result = sys.argv[1:]
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
sys.stderr.write(f"working on {name}\\n")
if sparsity == "0.5":
    raise RuntimeError("out of luck")
with open(f"{folder}/result.json", "w") as file:
    file.write(result)
"""
CHILD = """
import sys
from gossamer.train.config import compose, fingerprint

print(fingerprint(compose(sys.argv[1:])))
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Start a small script for each job, without checks, and record what was started."""
    commands: list[list[str]] = []

    def command(launch: Launch, overrides: Sequence[str]) -> list[str]:
        commands.append(list(overrides))
        cfg = compose(overrides)
        result = {
            "config_fingerprint": fingerprint(cfg),
            "finished": True,
            "metrics": {"error_after": cfg.sparsity, "error_before": 1.0},
        }
        arguments = [cfg.name, str(cfg.sparsity), cfg.run_dir, json.dumps(result)]
        return [sys.executable, "-S", "-c", JOB, *arguments]

    def report(folder: Path) -> Path:
        assert (folder / "summary.json").is_file()
        return folder / "report" / "index.html"

    check, reporter = ModuleType("gossamer.train.check"), ModuleType("gossamer.train.report")
    check.preflight = lambda cfg, stages, precision: {}  # type: ignore[attr-defined]
    reporter.sweep_report = report  # type: ignore[attr-defined]
    for fake in (check, reporter):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(module, "launch_command", command)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    return commands


def summary(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "summary.json").read_text())


def test_jobs_run_are_skipped_on_a_second_call_and_one_may_fail(
    started: list[list[str]], tmp_path: Path
) -> None:
    overrides = [f"runs_dir='{tmp_path}'", "sparsity=0.5,0.75", "compensation=drop,centroid"]
    assert sweep(overrides) == 1
    folder = tmp_path / "default-sweep"
    rows = summary(folder)
    assert [row["status"] for row in rows] == ["failed", "failed", "finished", "finished"]
    assert rows[2]["overrides"] == {"sparsity": 0.75, "compensation": "drop"}
    assert rows[2]["metrics"] == {"error_after": 0.75, "error_before": 1.0}
    assert rows[2]["run_dir"] == rows[2]["job"] == "sparsity=0.75,compensation=drop"
    assert rows[0]["error"] == "exit code 1: RuntimeError: out of luck"
    log = (folder / rows[2]["run_dir"] / "log.txt").read_text()
    assert log == "working on default-sweep/sparsity=0.75,compensation=drop\n"
    with (folder / "summary.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["error_after"] for row in table] == ["", "", "0.75", "0.75"]
    assert [row["compensation"] for row in table] == ["drop", "centroid"] * 2

    assert sweep(overrides) == 1
    assert [row["status"] for row in summary(folder)] == ["failed"] * 2 + ["skipped"] * 2
    assert len(started) == 4 + 2
    assert sweep([*overrides, "steps=7"]) == 1
    assert len(started) == 4 + 2 + 4, "another config is another job"


def test_a_call_whose_folders_hold_jobs_of_another_one_is_refused_before_any_starts(
    started: list[list[str]], tmp_path: Path
) -> None:
    lines = [f"runs_dir='{tmp_path}'", "name=mine", "seed=1,2"]  # the label is seed=1
    folder = tmp_path / "mine" / "seed=1"
    folder.mkdir(parents=True)
    save_config(compose([*lines[:2], "seed=1", "sparsity=0.95"]), folder / CONFIG)
    with pytest.raises(Refusal, match=r"sparsity: 0\.95 -> 0\.9"):
        sweep([*lines, "sparsity=0.9"])
    assert not started
    assert sweep([*lines, "sparsity=choice(0.9)"]) == 0, "a value that is swept is in the label"
    assert sweep([*lines, "sparsity=0.95"]) == 0


def test_a_job_finished_in_another_precision_is_not_taken_for_done(
    started: list[list[str]], tmp_path: Path
) -> None:
    overrides = [f"runs_dir='{tmp_path}'", "seed=choice(1)"]
    bf16, forced = "sweep.mixed_precision=bf16", "resume=force"
    path = tmp_path / "default-sweep" / "seed=1" / "result.json"
    assert sweep([*overrides, forced]) == 0
    assert sweep([*overrides, forced, bf16]) == 0
    assert len(started) == 1, "a result of an earlier version does not tell its precision"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mixed_precision": "no"}))
    assert sweep([*overrides, forced]) == 0 and len(started) == 1
    with pytest.raises(Refusal, match=r"mixed_precision=bf16: allowed is no, as in"):
        sweep([*overrides, "resume=auto", bf16])
    assert sweep([*overrides, forced, bf16]) == 0 and len(started) == 2


def test_jobs_are_checked_with_the_precision_that_they_will_have(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    fake = sys.modules["gossamer.train.check"]
    monkeypatch.setattr(fake, "preflight", lambda *_, precision: asked.append(precision))
    sweep([f"runs_dir='{tmp_path}'", "seed=1,2", "sweep.mixed_precision=bf16"])
    assert asked == ["bf16", "bf16"]


def test_a_sweep_without_failures_returns_zero(started: list[list[str]], tmp_path: Path) -> None:
    assert sweep([f"runs_dir='{tmp_path}'", "name=mine", "seed=range(0,2)"]) == 0
    assert [row["overrides"]["seed"] for row in summary(tmp_path / "mine")] == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sparsity=0.8"], "at least one a=1,2"),
        (["sparsity=0.8,1.5"], "[0, 1)"),
        (["sparsity=0.8,0.9", "polcy=hybrid"], "did you mean policy"),
        (["sparsity=0.8,0.9", "model=pretrained"], "model.path=???"),
        (["compensation=drop,centriod"], "did you mean centroid?"),
        (["name=a,b"], "one name"),
        (["sparsity=0.8,0.9", "run_dir=here"], "one folder per job"),
        (["sparsity=interval(0,1)"], "range()"),
        (["seed=1,2", "sweep.num_processes=0"], "at least 1"),
        (["seed=1,2", "sweep.mixed_precision=fp16"], "no, bf16"),
        (["seed=1,2", "sweep.processes=2"], "did you mean num_processes?"),
        (["seed=1,2", "stages=[calibrate]", "sweep.results=found.jsonl"], "stages with evaluate"),
    ],
)
def test_nothing_starts_when_one_job_is_wrong(
    overrides: list[str], said: str, started: list[list[str]], tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refusal:
        sweep([f"runs_dir='{tmp_path}'", *overrides])
    assert said in str(refusal.value)
    assert not started and not list(tmp_path.iterdir())


def test_only_show_prints_commands_that_compose(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["compensation=drop,centroid", "layout=tiles", f"runs_dir='{tmp_path}'"]
    assert sweep(overrides, only_show=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("gossamer train layout=") for line in lines)
    assert not started and not list(tmp_path.iterdir())


def test_folder_names_are_safe_short_and_unique(started: list[list[str]], tmp_path: Path) -> None:
    paths = [f"'/data/{'x' * 150}{end}/a b'" for end in "yz"]
    assert sweep([f"runs_dir='{tmp_path}'", f"model.path={','.join(paths)}"]) == 0
    names = {row["run_dir"] for row in summary(tmp_path / "default-sweep")}
    assert len(names) == 2 and all(len(name) < 120 and "/" not in name for name in names)


def test_secrets_stay_out_of_the_tables(started: list[list[str]], tmp_path: Path) -> None:
    urls = "'https://me:planted@host/a','https://me:planted@host/b'"
    assert sweep([f"runs_dir='{tmp_path}'", f"calibration.path={urls}"]) == 0
    folder = tmp_path / "default-sweep"
    assert "planted" not in (folder / "summary.json").read_text()
    assert "planted" not in (folder / "summary.csv").read_text()


def test_the_fingerprint_of_parent_and_child_agree(
    started: list[list[str]], tmp_path: Path
) -> None:
    sweep([f"runs_dir='{tmp_path}'", "sparsity=0.75,0.8"])
    child = [sys.executable, "-c", CHILD, *started[1]]
    found = subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip()
    assert found == fingerprint(compose(started[1])) != fingerprint(compose(started[0]))


def test_the_checkpoints_of_all_seeds_of_a_finished_job_go_if_they_are_not_to_be_kept(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Results, "add", lambda *_, **__: None)
    job = tmp_path / "default-sweep" / "seed=1"
    folders = [job / "checkpoints", job / "repeats" / "seed-5" / "checkpoints"]
    for folder in folders:
        (folder / "step-2").mkdir(parents=True)
    kept = [f"sweep.results={tmp_path}/found.jsonl", "sweep.keep_checkpoints=false"]
    assert sweep([f"runs_dir='{tmp_path}'", "seed=choice(1)", *kept]) == 0
    assert not any(folder.exists() for folder in folders)


def test_a_worker_that_had_to_be_killed_is_told_and_its_job_is_left(
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    monkeypatch.setattr(workers, "LEAST", 0.0)
    caplog.set_level("INFO", "gossamer")
    limits = ["sweep.workers=1", "sweep.time_limit=10", "sweep.grace=0.5"]
    assert sweep([f"runs_dir='{tmp_path}'", "seed=1,2", *limits]) == 0
    first, second = summary(tmp_path / "default-sweep")
    assert (first["status"], second["status"]) == ("stopped", "left")
    lost = "killed after 0.5 s of grace: its steps since the last checkpoint are lost"
    assert first["error"] == lost and "2 of 2 jobs are left" in caplog.text


def test_a_job_whose_results_cannot_be_kept_fails_alone(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(run_dir: Path) -> dict[str, Any]:
        if run_dir.name == "seed=1":
            raise ValueError("a file\nof two lines")
        return {"metrics": {}}

    monkeypatch.setattr("gossamer.train.study.record.record", record)
    checkpoints = tmp_path / "default-sweep" / "seed=1" / "checkpoints"
    checkpoints.mkdir(parents=True)
    kept = [f"sweep.results={tmp_path}/found.jsonl", "sweep.keep_checkpoints=false"]
    assert sweep([f"runs_dir='{tmp_path}'", "seed=1,2", *kept]) == 1
    first, second = summary(tmp_path / "default-sweep")
    assert (first["status"], second["status"]) == ("failed", "finished")
    assert first["error"] == "not in sweep.results: ValueError a file of two lines"
    assert checkpoints.is_dir() and len((tmp_path / "found.jsonl").read_text().splitlines()) == 1


@pytest.mark.multi
@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerate_starts_the_processes_and_their_refusal_is_found(num_processes: int) -> None:
    command = launch_command(Launch(num_processes=num_processes), ["sparsity=2"])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    # the launcher may end the second before it has said so too
    assert 1 <= done.stderr.count("error: sparsity=2") <= num_processes
    assert module._last_error(done.stderr).startswith("error: sparsity=2")
