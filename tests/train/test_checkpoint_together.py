"""Processes that share out a checkpoint: each writes its rows, and all believe the same of it."""

import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from gossamer.train import checkpoint
from gossamer.train.checkpoint import latest, load, save
from gossamer.train.processes import ALONE, Together, accepted
from gossamer.train.refusal import Refusal
from gossamer.train.tensor_files import Rows

SHARED = {"weight": (7, 3), "half": (8, 2), "short": (2, 5)}
POINTS = [
    ("before-dir", 0),
    ("after-dir", 0),
    ("after-file:state.json", 0),
    *((f"after-file:{group}-0000{n + 1}-of-00002.safetensors", n)
      for n in (0, 1) for group in ("model", "optimizer")),
    ("before-manifest", 0),
    ("before-rename", 0),
    ("after-rename", 0),
    ("during-prune", 0),
    ("after-prune", 0),
]  # fmt: skip


class Crash(Exception):
    pass


class Gone(Exception):
    pass


class Meeting:
    """Where threads in the place of processes gather values; fails when one of them is gone."""

    def __init__(self, count: int) -> None:
        self.count, self.is_broken = count, False
        self.changed = threading.Condition()
        self.rounds: dict[int, dict[int, Any]] = {}

    def gather(self, number: int, rank: int, value: Any) -> list[Any]:
        with self.changed:
            said = self.rounds.setdefault(number, {})
            said[rank] = value
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(said) == self.count or self.is_broken, 30)
            if len(said) < self.count:
                raise Gone
            return [said[rank] for rank in range(self.count)]

    def leave(self) -> None:
        with self.changed:
            self.is_broken = True
            self.changed.notify_all()


@dataclass(frozen=True)
class InThread(Together):
    """One of the threads of a meeting."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    calls: Iterator[int] = field(default_factory=count)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(next(self.calls), self.rank, value)


def in_threads(
    processes: int, work: Callable[[Together], Any], *, writers: int | None = None
) -> list[Any]:
    """Do work in threads; return what each returned or raised.

    When one crashes, those that wait for it fail, as processes do.
    """
    results: list[Any] = [None] * processes
    meeting = Meeting(processes)

    def run(rank: int) -> None:
        try:
            results[rank] = work(InThread(rank, processes, writers or processes, meeting))
        except BaseException as error:
            results[rank] = error
            if isinstance(error, Crash):
                meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(step)
    model = {name: torch.randn(shape, generator=chance) for name, shape in SHARED.items()}
    model |= {"half": model["half"].bfloat16(), "bias": torch.randn(4, generator=chance)}
    moments = {f"{name}/exp_avg": tensor * 2 for name, tensor in model.items()}
    return {"model": model, "optimizer": {**moments, "weight/step": torch.tensor(float(step))}}


def share_of(step: int, together: Together) -> dict[str, dict[str, Tensor | Rows]]:
    """Return what one of the writers has: rows as FSDP shares them out, the rest in the first."""
    found: dict[str, dict[str, Tensor | Rows]] = {}
    for group, flat in groups(step).items() if together.writes else ():
        found[group] = {}
        for name, tensor in flat.items():
            if name.partition("/")[0] in SHARED and tensor.ndim > 1:
                parts = tensor.chunk(together.writers)
                if together.rank < len(parts):
                    first = sum(map(len, parts[: together.rank]))
                    found[group][name] = Rows(parts[together.rank], first, len(tensor))
            elif together.is_first:
                found[group][name] = tensor
    return found


def put(
    folder: Path, step: int, together: Together, fault: Callable[[str], None] = lambda point: None
) -> Path | None:
    given = {"state": {"step": step}, "keep": 2, "together": together, "fault": fault}
    return save(folder, step, tensors=share_of(step, together), **given)


def assert_holds(path: Path | None, step: int) -> None:
    assert path is not None
    found, state = load(path)
    assert state == {"step": step} and found.keys() == groups(step).keys()
    for group, flat in groups(step).items():
        assert found[group].keys() == flat.keys()
        assert all(torch.equal(found[group][name], tensor) for name, tensor in flat.items())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("processes", "writers"), [(1, 1), (2, 2), (3, 3), (4, 2), (3, 1)])
def test_the_rows_of_all_are_the_checkpoint_of_one(
    processes: int, writers: int, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        paths = in_threads(processes, lambda t, s=step: put(tmp_path, s, t), writers=writers)
        assert paths == [tmp_path / f"step-{step}"] * processes
    assert names(tmp_path) == {"step-2", "step-3"}
    for step in (2, 3):
        assert_holds(tmp_path / f"step-{step}", step)
    for number in (1, 2, 3):
        found = in_threads(number, lambda t: latest(tmp_path, t))
        assert found == [tmp_path / "step-3"] * number
    files = list((tmp_path / "step-3").glob("*.safetensors"))
    assert len(files) == 2 * writers
    if writers == 1:
        assert {path.name for path in files} == {"model.safetensors", "optimizer.safetensors"}
        return
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                whole = groups(3)[path.name.partition("-")[0]][name].shape
                shared = name.partition("/")[0] in SHARED and len(whole) > 1
                here = tuple(file.get_slice(name).get_shape())
                assert (len(here) > 0 and here[0] < whole[0]) if shared else here == whole


@pytest.mark.case("F2")
@pytest.mark.parametrize(("point", "rank"), POINTS)
def test_a_process_that_dies_at_any_point_leaves_a_whole_checkpoint(
    point: str, rank: int, tmp_path: Path
) -> None:
    for step in (10, 20):
        in_threads(2, lambda t, s=step: put(tmp_path, s, t))

    def dying(together: Together) -> Path | None:
        def fault(reached: str) -> None:
            if (reached, together.rank) == (point, rank):
                raise Crash

        return put(tmp_path, 30, together, fault)

    ends = in_threads(2, dying)
    assert isinstance(ends[rank], Crash)
    moved = point in ("after-rename", "during-prune", "after-prune")
    at = 30 if moved else 20
    if point in ("during-prune", "after-prune"):
        assert ends[1 - rank] == tmp_path / "step-30"  # which all had verified
    else:
        assert isinstance(ends[1 - rank], Gone)
    assert_holds(latest(tmp_path), at)
    assert in_threads(2, lambda t: put(tmp_path, 30, t)) == [tmp_path / "step-30"] * 2
    assert names(tmp_path) == {"step-20", "step-30"}
    assert_holds(latest(tmp_path), 30)


@pytest.mark.case("F3")
@pytest.mark.parametrize(("point", "rank"), POINTS[:-3])
def test_a_disk_that_fails_one_process_fails_the_save_of_all(
    point: str, rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_threads(2, lambda t: put(tmp_path, 1, t))

    def full(together: Together) -> Path | None:
        def fault(reached: str) -> None:
            if (reached, together.rank) == (point, rank):
                raise OSError(28, "No space left on device")

        return put(tmp_path, 2, together, fault)

    assert in_threads(2, full) == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoint step-2 not saved, the older ones stay: "
        f"process {rank}: [Errno 28] No space left on device"
    ]
    assert names(tmp_path) == {"step-1"}
    assert in_threads(2, lambda t: put(tmp_path, 2, t)) == [tmp_path / "step-2"] * 2


def test_a_copy_that_one_process_cannot_read_back_is_removed_for_all(tmp_path: Path) -> None:
    in_threads(2, lambda t: put(tmp_path, 1, t))
    bad = "optimizer-00002-of-00002.safetensors"

    def rotting(together: Together) -> Path | None:
        def fault(reached: str) -> None:
            if reached == "after-rename":
                (tmp_path / "step-2" / bad).write_bytes(b"rot")

        return put(tmp_path, 2, together, fault)

    assert in_threads(2, rotting) == [None, None]
    assert names(tmp_path) == {"step-1"}


@pytest.mark.case("F4")
def test_a_shard_that_is_changed_cut_or_missing_is_seen_by_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(0)
    for step in (1, 2):
        in_threads(2, lambda t, s=step: put(tmp_path / "whole", s, t))
    for number, path in enumerate(sorted((tmp_path / "whole" / "step-2").iterdir())):
        for way in ("flip", "cut", "delete"):
            folder = tmp_path / f"{number}{way}"
            shutil.copytree(tmp_path / "whole", folder)
            file, data = folder / "step-2" / path.name, bytearray(path.read_bytes())
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            match way:
                case "flip":
                    file.write_bytes(data)
                case "cut":
                    file.write_bytes(path.read_bytes()[: chance.randrange(len(data))])
                case "delete":
                    file.unlink()
            for readers in (1, 2, 3):
                caplog.clear()
                found = in_threads(readers, lambda t, f=folder: latest(f, t))
                assert found == [folder / "step-1"] * readers
                assert len(caplog.records) == 1 and f"is damaged ({path.name})" in caplog.text


@pytest.mark.case("F4", control=True)
def test_a_process_that_leaves_its_files_unread_would_miss_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(2, lambda t: put(tmp_path, 1, t))
    file = tmp_path / "step-1" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    own = checkpoint._own_problem

    def lazy(path: Path, quick: bool, together: Together) -> str | None:
        return own(path, quick, together) if together.rank else None

    monkeypatch.setattr(checkpoint, "_own_problem", lazy)
    assert in_threads(2, lambda t: latest(tmp_path, t)) == [tmp_path / "step-1"] * 2


def test_a_manifest_that_lost_a_shard_is_refused(tmp_path: Path) -> None:
    in_threads(2, lambda t: put(tmp_path, 1, t))
    path = tmp_path / "step-1"
    manifest = checkpoint._manifest(path)
    del manifest["files"]["model-00002-of-00002.safetensors"]
    (path / checkpoint.MANIFEST).write_text(checkpoint._manifest_text(manifest))
    assert checkpoint.problem(path) is None
    with pytest.raises(Refusal, match=r"model/\w+=rows 0-\d of \d: allowed is each"):
        load(path)


@pytest.mark.case("N5")
def test_numbers_of_one_process_that_are_not_finite_stop_all(tmp_path: Path) -> None:
    def bad(together: Together) -> Path | None:
        tensors = share_of(1, together)
        if together.rank == 1:
            rows = tensors["model"]["weight"]
            assert isinstance(rows, Rows)
            rows.tensor[0, 0] = torch.nan
        return save(tmp_path, 1, tensors=tensors, state={}, keep=2, together=together)

    ends = in_threads(3, bad)
    assert all(isinstance(end, Refusal) and "model/weight" in str(end) for end in ends)
    assert not list(tmp_path.iterdir())


def test_a_refusal_in_some_ends_all_and_is_said_by_the_first_process() -> None:
    def work(together: Together) -> str:
        def refuse() -> None:
            if together.rank in (1, 2):
                raise Refusal("x", together.rank, "0", "mend it")

        accepted(refuse, together)
        return "went on"

    saying, *silent = in_threads(3, work)
    assert isinstance(saying, Refusal) and "x=1" in str(saying)
    assert f"(process 1 on {socket.gethostname()})" in str(saying)
    assert all(isinstance(end, SystemExit) and end.code == 2 for end in silent)
    assert work(ALONE) == "went on" and in_threads(1, work) == ["went on"]
