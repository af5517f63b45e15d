"""Whatever happens to a save or to what it wrote, a whole checkpoint stays and is found."""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.train import checkpoint, run_lock
from gossamer.train.checkpoint import latest, load, step_of
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import RunLock

POINTS = [
    "before-dir",
    "after-dir",
    "after-file:state.json",
    "after-file:model.safetensors",
    "after-file:optimizer.safetensors",
    "after-file:ema.safetensors",
    "before-manifest",
    "before-rename",
    "publish",  # the old one moved aside, the new one not yet in its place
    "after-rename",
    "during-prune",
    "after-prune",
]


def put(folder: Path, step: int, fault: Callable[[str], None] = lambda point: None) -> Path | None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    tensors: dict[str, dict[str, Tensor]] = {
        "model": {"weight": weight, "bias": weight[0].bfloat16()},
        "optimizer": {"weight/exp_avg": weight * 2},
        "ema": {"weight": weight / 2},
    }
    return checkpoint.save(folder, step, tensors=tensors, state={"at": step}, keep=2, fault=fault)


def newest(folder: Path) -> int:
    path = latest(folder)
    assert path is not None
    return load(path)[1]["at"]


def in_child(work: Callable[[], None]) -> int:
    """Do work in a process of its own and return its exit status as subprocess counts it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(point: str) -> Callable[[str], None]:
    def die(reached: str) -> None:
        if reached == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


@pytest.mark.case("F2")
@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_at_any_point_leaves_a_whole_checkpoint(
    point: str, rounds: Any, tmp_path: Path
) -> None:
    for number in rounds(1, 3):
        folder = tmp_path / str(number)
        for step in (1, 2):
            put(folder, step)
        step = 2 if point == "publish" else 3  # the same step saved again, or a new one

        def save_and_die(folder: Path = folder, step: int = step) -> None:
            checkpoint.publish = lambda made, final: dying_at("publish")(point)
            if point != "publish":
                from gossamer.train.files import publish

                checkpoint.publish = publish
            put(folder, step, dying_at(point))

        assert in_child(save_and_die) == -signal.SIGKILL
        assert newest(folder) == (3 if point in POINTS[-3:] else 2)
        for again in (step, step + 1):  # over what is left
            assert put(folder, again) and newest(folder) == again
        assert sorted(path.name for path in folder.iterdir()) == [
            f"step-{step}",
            f"step-{step + 1}",
        ]


def watched_saves(folder: Path) -> None:
    """Save four times, one step twice; before every change on disk a whole one must be there."""
    put(folder, 1)
    put(folder, 2)
    busy = False

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        busy = True
        try:
            whole = [p for p in checkpoint._newest_first(folder) if checkpoint.problem(p) is None]
            if not whole:
                os.write(2, f"no whole checkpoint before {event} {args}\n".encode())
                os._exit(7)
        finally:
            busy = False

    sys.addaudithook(look)
    for step in (2, 3, 3, 4):
        put(folder, step)


@pytest.mark.case("F2")
def test_there_is_a_whole_checkpoint_before_every_change_on_disk(tmp_path: Path) -> None:
    assert in_child(lambda: watched_saves(tmp_path)) == 0


@pytest.mark.case("F2", control=True)
def test_a_save_that_first_removes_the_old_ones_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(folder: Path) -> None:
        for path in checkpoint._newest_first(folder):
            shutil.rmtree(path)

    monkeypatch.setattr(checkpoint, "_clean", careless)
    assert in_child(lambda: watched_saves(tmp_path)) == 7


def mutate(folder: Path, chance: random.Random) -> str:
    """Flip one bit of, truncate, or delete one random file of a checkpoint; return its name."""
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    match chance.choice(["flip", "truncate", "delete"]):
        case "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        case "truncate":
            path.write_bytes(data[: chance.randrange(len(data))])
        case "delete":
            path.unlink()
    return path.name


@pytest.mark.case("F4")
def test_random_mutations_are_all_detected_and_named(
    rounds: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, chance = tmp_path / "original", random.Random(0)
    put(original, 1)
    put(original, 2)
    for number in rounds(40, 200):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        caplog.clear()
        name = mutate(folder / "step-2", chance)
        assert latest(folder) == folder / "step-1"
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert f"step-2 is damaged ({name})" in caplog.text
        with pytest.raises(Refusal, match=name):
            load(folder / "step-2")


@pytest.mark.case("F4", control=True)
def test_without_the_hashes_a_flipped_bit_would_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    path = tmp_path / "step-1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert latest(tmp_path) is None
    monkeypatch.setattr(checkpoint, "problem", lambda path, **kind: None)
    assert latest(tmp_path) == tmp_path / "step-1"
    assert load(tmp_path / "step-1")[1]["at"] == 1


@pytest.mark.case("F3")
def test_a_disk_that_fills_at_any_moment_keeps_the_old_checkpoint(
    rounds: Any, tmp_path: Path
) -> None:
    chance = random.Random(3)
    for number in rounds(5, 20):
        folder, point = tmp_path / str(number), chance.choice(POINTS[:8])

        def full(reached: str, point: str = point) -> None:
            if reached == point:
                raise OSError(28, "No space left on device")

        put(folder, 1)
        assert put(folder, 2, full) is None and newest(folder) == 1
        assert [path.name for path in folder.iterdir()] == ["step-1"]
        assert put(folder, 2) is not None and newest(folder) == 2


SAVING = {"steps": 8, "checkpoint_every": 1}


@pytest.mark.case("F3")
@pytest.mark.parametrize("fault", ["small_files", "read_only_after_a_save"])
def test_a_job_whose_disk_takes_nothing_more_stops_after_three_saves_with_exit_3(
    fault: str, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path, **SAVING), inject=injection(fault))
    run = lab.run(tmp_path)
    assert done.code == 3 and "Traceback" not in done.text, done.text
    assert done.text.count("not saved, the older ones stay") == 3
    assert "a disk that takes them; free some space" in done.errors[0]
    assert step_of(run.newest) == len(run.losses) - 3
    load(run.newest)
    assert launcher.run(lab.student(tmp_path, **SAVING)).code == 0


@pytest.mark.case("F3", control=True)
def test_failed_saves_that_are_not_counted_are_noticed(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, **SAVING)
    done = launcher.run(overrides, inject=injection("failed_saves_pass_for_good"))
    assert done.code == 0 and step_of(lab.run(tmp_path).newest) == 1


@pytest.mark.case("F8")
def test_a_run_folder_on_a_read_only_file_system_is_refused(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    start = time.monotonic()
    done = launcher.run(lab.student(Path("/proc/gossamer")))
    assert done.code == 2 and "a folder to write into" in done.errors[0], done.text
    assert "Traceback" not in done.text and time.monotonic() - start < 10


def contend(folder: Path, number: int) -> None:
    """Try to take a lock, and hold it until all four have tried."""
    end = time.monotonic() + 30
    try:
        with RunLock(folder):
            (folder / f"got-{number}").touch()
            while len(list(folder.glob("*-[0-3]"))) < 4 and time.monotonic() < end:
                time.sleep(0.01)
    except Refusal as refusal:
        (folder / f"refused-{number}").write_text(str(refusal))


def race(folder: Path) -> tuple[int, list[str]]:
    """Let four processes take one lock at once; return how many got it, and what the others say."""
    folder.mkdir()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                contend(folder, number)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return len(list(folder.glob("got-*"))), [f.read_text() for f in folder.glob("refused-*")]


@pytest.mark.case("F11")
def test_of_processes_that_race_for_a_run_folder_one_gets_it(rounds: Any, tmp_path: Path) -> None:
    for number in rounds(2, 10):
        got, refused = race(tmp_path / str(number))
        assert got == 1 and len(refused) == 3
        assert all("a folder no other run writes" in line for line in refused)


@pytest.mark.case("F11", control=True)
def test_without_the_lock_two_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock.fcntl, "lockf", lambda *args: None)
    monkeypatch.setattr(run_lock, "_started", lambda pid: "")
    assert race(tmp_path / "folder")[0] > 1


@pytest.mark.case("C12")
def test_the_exported_settings_are_those_of_the_training(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    stages = ["calibrate", "train", "export"]
    assert launcher.run(lab.student(tmp_path, steps=2, stages=stages)).code == 0
    folder = tmp_path / "student"
    trained = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    stored = json.loads((folder / "export" / "sparse_attention_config.json").read_text())
    assert isinstance(trained, dict)
    parts = {"layout", "estimator", "policy", "compensation", "backend"}
    assert parts <= stored["method"].keys()
    assert {name: stored["method"][name] for name in parts} == {n: trained[n] for n in parts}
    trained["policy"] = {**trained["policy"], "k": 0.123}  # the control: a difference shows
    assert stored["method"]["policy"] != trained["policy"]
