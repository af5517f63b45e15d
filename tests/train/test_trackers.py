"""Numbers are kept locally whatever happens; a tracker that fails never ends a run."""

import json
import logging
import math
import os
import pty
import resource
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer.train import loop
from gossamer.train.refusal import Refusal
from gossamer.train.stages import train_stage
from gossamer.train.trackers import MetricsLog, NoTracker, Tensorboard, Tracker, Wandb

KEY = "0123456789abcdef" * 3


def steps(log: MetricsLog) -> list[int]:
    return [row["step"] for row in log.rows()]


def test_rows_come_back_in_order_and_are_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    log.append({"step": 1, "loss": 0.1 + 0.2, "clip": "ä\u2028b"})
    log.append({"step": 2, "loss": 1e-300})
    lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2]
    log.sync()
    expected = [{"step": 1, "loss": 0.1 + 0.2, "clip": "ä\u2028b"}, {"step": 2, "loss": 1e-300}]
    assert MetricsLog(tmp_path / "metrics.jsonl").rows() == expected


def test_nan_is_written_as_json_null_and_read_as_nan(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": math.nan, "norm": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    assert math.isnan(log.rows()[0]["loss"]) and math.isnan(log.rows()[0]["norm"])


def test_rows_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(3)
    for step in range(1, 8):
        log.append({"step": step})
    log.truncate_after(5)
    log.append({"step": 6, "again": 1})
    assert steps(log) == [1, 2, 3, 4, 5, 6] and log.rows()[-1]["again"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\x00\x00\x00", b'"step"', b"\xff{"])
def test_a_half_written_last_line_costs_no_other_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    log = MetricsLog(path)
    log.append({"step": 3})
    assert steps(log) == [1, 2, 3] and "line 3" in caplog.text
    log.truncate_after(2)
    log.append({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_disk_that_fails_loses_rows_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        log.append({"step": 2})
        log.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(caplog.records) == 1
    log.append({"step": 4})
    assert steps(log) == [1, 4]


def test_a_deleted_folder_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path / "gone" / "metrics.jsonl")
    log.append({"step": 1})
    log.append({"step": 2})
    log.sync()
    assert len(caplog.records) == 1


class Failing:
    """A wandb run or TensorBoard writer whose server or disk is gone."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def fail(*args: object, **kwargs: object) -> None:
            self.calls.append(name)
            raise RuntimeError("the server is gone")

        return fail


def run(tracker: Tracker, run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    tracker.start(run_dir, {"steps": 3, "nested": {"list": [1, None, "a"]}})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1 / step, "norm": math.nan})
    tracker.finish()


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    run(NoTracker(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_every_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(Tensorboard(), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx([1, 1 / 2, 1 / 3])
    assert "config/text_summary" in events.Tags()["tensors"]


def test_tensorboard_that_fails_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    writer = Failing()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda folder: writer)
    run(Tensorboard(), tmp_path)
    assert writer.calls == ["add_text", "close"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the server is gone" in caplog.text


def test_tensorboard_outlives_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    tracker = Tensorboard()
    tracker.start(tmp_path, {})
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(300):
        tracker.log(step, {"loss": 1.0})
    tracker.finish()
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("tracker", [Tensorboard(), Wandb()], ids=["tensorboard", "wandb"])
def test_a_missing_package_is_refused_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Tracker
) -> None:
    name = type(tracker).__name__.lower()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match=f"pip install {name}"):
        tracker.start(tmp_path, {})


@pytest.mark.parametrize(
    "wrong", [{"mode": "on"}, {"mode": ""}, {"timeout": 0.0}, {"timeout": math.nan}]
)
def test_wandb_settings_that_do_not_exist_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        Wandb(**wrong)


def test_a_training_that_fails_ends_its_tracker_which_is_told_no_secret(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Tensorboard, "start", lambda _, folder, config: told.append(str(config)))
    monkeypatch.setattr(Tensorboard, "finish", lambda _: told.append("the end"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise Refusal("steps", 11, "at most max_skipped=10", "lower optimizer.lr")

    monkeypatch.setattr(loop, "train", fail)
    job = make_job(tracker="tensorboard", data__cache="'https://me:planted@host/cache'")
    with pytest.raises(Refusal, match="max_skipped"):
        train_stage(job)
    assert len(told) == 2 and told[1] == "the end"
    assert "host/cache" in told[0] and "planted" not in told[0]


def test_trackers_not_started_ignore_numbers() -> None:
    for tracker in (Tensorboard(), Wandb()):
        tracker.log(1, {"loss": 1.0})
        tracker.finish()


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def finish(self) -> None:
        pass


def fake_wandb(monkeypatch: pytest.MonkeyPatch, returned: Any) -> list[dict[str, Any]]:
    wandb = pytest.importorskip("wandb")
    calls: list[dict[str, Any]] = []

    def init(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return returned

    monkeypatch.setattr(wandb, "init", init)
    return calls


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_always_gets_its_mode_folder_and_the_same_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fake = FakeRun()
    calls = fake_wandb(monkeypatch, fake)
    for _ in range(2):
        run(Wandb(mode=mode, project="p"), tmp_path)
    assert [call["mode"] for call in calls] == [mode, mode]
    assert calls[0]["dir"] == str(tmp_path)
    assert (calls[0]["project"], calls[0]["resume"]) == ("p", "allow")
    stored = (tmp_path / "wandb_id.txt").read_text()
    assert calls[0]["id"] == calls[1]["id"] == stored and len(stored) == 8
    assert [step for step, _ in fake.rows] == [1, 2, 3, 1, 2, 3]


def test_wandb_that_fails_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wandb(monkeypatch, Failing())
    run(Wandb(), tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


PROGRAM = """
import logging, shutil, sys
from pathlib import Path
from gossamer.train.refusal import Refusal
from gossamer.train.trackers import Wandb
logging.basicConfig()
tracker = Wandb(mode=sys.argv[2], timeout=1)
try:
    tracker.start(Path(sys.argv[1]), {"lr": 0.1, "nested": {"list": [1, None]}})
except Refusal as refusal:
    sys.exit(f"REFUSED {refusal}")
sys.stdout.write("ARGUMENTS " + " ".join(sys.argv))
for step in (1, 2, 3):
    tracker.log(step, {"loss": 1 / step})
if "--delete" in sys.argv:
    shutil.rmtree(sys.argv[1])
    tracker.log(4, {"loss": 0.1})
tracker.finish()
"""


def program(tmp_path: Path, mode: str, *flags: str, **variables: str) -> tuple[int, str]:
    """Run wandb in its own process, at a terminal, without a home that knows a login."""
    pytest.importorskip("wandb")
    home, run_dir, script = tmp_path / "home", tmp_path / "run", tmp_path / "program.py"
    home.mkdir()
    run_dir.mkdir()
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "NETRC"))}
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(gossamer.__file__).parents[1])}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "TERM": "xterm"} | variables
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(script), str(run_dir), mode, *flags],
        env=environment, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside,
    )  # fmt: skip
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        if select.select([terminal], [], [], 0.05)[0]:
            output += os.read(terminal, 1 << 16)
        elif ended:
            break
    process.kill()
    os.close(terminal)
    os.close(inside)
    return process.wait(), output.decode()


@pytest.mark.case("F12")
def test_an_offline_wandb_run_needs_no_login_and_writes_no_secret(tmp_path: Path) -> None:
    code, output = program(tmp_path, "offline", f"--token={KEY}", WANDB_API_KEY=KEY)
    assert code == 0 and KEY in output, output
    recorded = list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    stored = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert [path.name for path in recorded] == [f"run-{stored}.wandb"]
    assert b"loss" in recorded[0].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "run", "program.py"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.case("F12")
def test_an_offline_wandb_run_outlives_its_folder(tmp_path: Path) -> None:
    code, output = program(tmp_path, "offline", "--delete")
    assert code == 0 and "Traceback" not in output, output


@pytest.mark.case("F12")
@pytest.mark.parametrize("variables", [{}, {"WANDB_API_KEY": "short"}], ids=["no key", "bad key"])
def test_wandb_online_without_a_usable_key_is_refused_even_at_a_terminal(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    code, output = program(tmp_path, "online", **variables)
    assert code == 1 and "REFUSED tracker=wandb online" in output and "offline" in output
    assert "Traceback" not in output and "short" not in output


@pytest.mark.case("F12")
def test_wandb_online_without_a_server_is_recorded_offline(tmp_path: Path) -> None:
    code, output = program(tmp_path, "online", WANDB_API_KEY=KEY, WANDB_MODE="disabled")
    assert code == 0, output
    assert "recording offline" in output and KEY not in output
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
