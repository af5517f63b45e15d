"""Whatever happens during a save, a whole checkpoint stays; what is damaged is never used."""

import json
import os
import pickle
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gossamer
from gossamer.train import checkpoint, run_lock
from gossamer.train.checkpoint import latest, load, save
from gossamer.train.files import sha256
from gossamer.train.optimizer_state import load_optimizer, optimizer_tensors
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import RunLock, this_machine

POINTS = [
    "before-dir",
    "after-dir",
    "after-file:state.json",
    "after-file:model.safetensors",
    "after-file:optimizer.safetensors",
    "before-manifest",
    "before-rename",
    "after-rename",
    "during-prune",
    "after-prune",
]


# Where child processes find the package, installed or not.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(gossamer.__file__).parents[1])}


class Crash(Exception):
    pass


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 8, generator=generator)
    return {
        "model": {"weight": weight, "bias": weight[0].bfloat16()},
        "optimizer": {"weight/exp_avg": weight * 2, "weight/step": torch.tensor(float(step))},
    }


def put(folder: Path, step: int, *, keep: int = 2, fault: Callable[[str], None] | None = None):
    given = {} if fault is None else {"fault": fault}
    return save(folder, step, tensors=groups(step), state={"step": step}, keep=keep, **given)


def crash_at(point: str) -> Callable[[str], None]:
    def fault(reached: str) -> None:
        if reached == point:
            raise Crash

    return fault


def step_of(path: Path | None) -> int:
    assert path is not None
    return load(path)[1]["step"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "model": {
            "view": torch.arange(12.0).view(3, 4).t(),
            "scalar": torch.tensor(-0.0),
            "none": torch.empty(0, 3),
            "bfloat16": torch.tensor([1e-40, 3.0]).bfloat16(),
            "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        },
        "random": {"cpu": torch.get_rng_state()},
    }
    state = {"loss": 0.1 + 0.2, "names": ["ä"], "best": float("inf")}
    path = save(tmp_path / "a b", 7, tensors=tensors, state=state, keep=2)
    assert path == tmp_path / "a b" / "step-7"
    read, read_state = load(path)
    assert read_state == state
    assert read.keys() == tensors.keys()
    for group, flat in tensors.items():
        assert read[group].keys() == flat.keys()
        for name, tensor in flat.items():
            other = read[group][name]
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            one, two = (t.contiguous().flatten().view(torch.uint8) for t in (other, tensor))
            assert torch.equal(one, two)


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    flat = {"a": weight, "b": weight, "row": weight[1]}
    read, _ = load(save(tmp_path, 1, tensors={"model": flat}, state={}, keep=2))
    assert all(torch.equal(read["model"][name], tensor) for name, tensor in flat.items())


def test_the_newest_keep_checkpoints_stay(tmp_path: Path) -> None:
    for step in (2, 5, 10, 100):
        put(tmp_path, step)
    assert names(tmp_path) == {"step-10", "step-100"}
    plain = tmp_path / "plain"
    plain.touch()
    files = (tmp_path / "step-100").iterdir()
    assert {path.stat().st_mode for path in files} == {plain.stat().st_mode}
    assert step_of(latest(tmp_path)) == 100


@pytest.mark.parametrize("keep", [1, 0, -3])
def test_keeping_fewer_than_two_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(Refusal, match="keep"):
        put(tmp_path, 1, keep=keep)


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


@pytest.mark.case("F2")
@pytest.mark.parametrize("again", [False, True], ids=["new step", "step saved before"])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(
    tmp_path: Path, point: str, again: bool
) -> None:
    put(tmp_path, 10)
    put(tmp_path, 20)
    target = 20 if again else 30
    seen = []

    def fault(reached: str) -> None:
        seen.append(reached)
        assert step_of(latest(tmp_path)) in (10, 20, 30)
        crash_at(point)(reached)

    with pytest.raises(Crash):
        put(tmp_path, target, fault=fault)
    assert seen == POINTS[: len(seen)] and seen[-1] == point
    moved = point in POINTS[-3:]
    assert step_of(latest(tmp_path)) == (target if moved else 20)

    assert put(tmp_path, target) == tmp_path / f"step-{target}"
    assert names(tmp_path) == {f"step-{target - 10}", f"step-{target}"}
    assert step_of(latest(tmp_path)) == target


@pytest.mark.case("F2")
def test_a_crash_between_moving_aside_and_publishing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 10)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "publish", lambda made, final: crash_at("")(""))
        put(tmp_path, 10)
    assert latest(tmp_path) == tmp_path / "step-10.old"
    put(tmp_path, 10)
    assert names(tmp_path) == {"step-10"}


def test_leftovers_without_a_manifest_are_cleaned_and_other_files_are_not(tmp_path: Path) -> None:
    for name in ("step-5", "step-9", ".step-9.tmp", "step-notes", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    put(tmp_path, 9)
    assert names(tmp_path) == {"step-9", "step-notes", "mine"}
    assert step_of(latest(tmp_path)) == 9


@pytest.mark.case("F4")
def test_every_flipped_byte_of_the_manifest_is_detected(tmp_path: Path) -> None:
    put(tmp_path, 1)
    manifest = tmp_path / "step-1" / "manifest.json"
    original = manifest.read_bytes()
    rng = random.Random(1)
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 1 << rng.randrange(8)
        manifest.write_bytes(data)
        assert checkpoint.problem(tmp_path / "step-1") is not None, position


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    (tmp_path / "step-2" / "model.safetensors").write_bytes(b"")
    put(tmp_path, 3)
    assert names(tmp_path) == {"step-1", "step-3"}


def test_checkpoints_past_the_saved_step_are_set_aside_not_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 5):
        put(tmp_path, step, keep=3)
    put(tmp_path, 3)
    assert names(tmp_path) == {"step-2", "step-3", "set-aside-step-5"}
    assert "set-aside-step-5" in caplog.text
    assert step_of(latest(tmp_path)) == 3


def rehash(folder: Path, **changes: object) -> None:
    """Write a valid manifest for whatever lies in a checkpoint folder."""
    files = {
        path.name: {"sha256": sha256(path), "size": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    manifest = json.loads((folder / "manifest.json").read_text()) | {"files": files} | changes
    del manifest["digest"]
    (folder / "manifest.json").write_text(checkpoint._manifest_text(manifest))


@pytest.mark.case("F9")
def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    rehash(tmp_path / "step-2", format=checkpoint.FORMAT + 1)
    assert latest(tmp_path) == tmp_path / "step-2"
    with pytest.raises(Refusal, match="update gossamer"):
        load(tmp_path / "step-2")


@pytest.mark.case("N5")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_loaded_nor_saved(
    tmp_path: Path, value: float
) -> None:
    path = put(tmp_path, 1)
    bad = {"weight": torch.tensor([0.0, value]).bfloat16()}
    save_file(bad, path / "model.safetensors")
    rehash(path)
    with pytest.raises(Refusal, match="model/weight"):
        load(path)
    with pytest.raises(Refusal, match="model/weight"):
        save(tmp_path, 2, tensors={"model": bad}, state={}, keep=2)
    assert names(tmp_path) == {"step-1"}


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.case("C3")
def test_a_pickle_in_any_place_of_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = pickle.dumps(Evil(marker))
    pickle.loads(payload)
    assert marker.exists()  # the control: the payload works
    marker.unlink()
    places = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    for number, name in enumerate([*places, "extra.safetensors", "random_states_0.pkl"]):
        for honest_manifest in (True, False):
            folder = tmp_path / f"{number}{honest_manifest}"
            path = put(folder, 1)
            (path / name).write_bytes(payload)
            if not honest_manifest and name != "manifest.json":
                rehash(path)
            latest(folder)
            try:
                load(path)
            except Refusal:
                assert name != "random_states_0.pkl"
            put(folder, 2)
    assert not marker.exists()


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    (tmp_path / "x.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    files = {"../x.safetensors": {"sha256": "", "size": 0}}
    rehash(path, files=files)
    assert checkpoint.problem(path) == "manifest.json"


def full_disk(point: str) -> Callable[[str], None]:
    def fault(reached: str) -> None:
        if reached == point:
            raise OSError(28, "No space left on device")

    return fault


@pytest.mark.case("F3")
@pytest.mark.parametrize("point", POINTS[:-3])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, point: str
) -> None:
    put(tmp_path, 1)
    assert put(tmp_path, 2, fault=full_disk(point)) is None
    assert "No space left" in caplog.text
    assert names(tmp_path) == {"step-1"} and step_of(latest(tmp_path)) == 1
    assert put(tmp_path, 2) is not None


@pytest.mark.case("F3")
def test_a_file_the_system_will_not_write_is_the_same_as_a_full_disk(tmp_path: Path) -> None:
    put(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"model": {"w": torch.zeros(1 << 20)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        assert save(tmp_path, 2, tensors=large, state={}, keep=2) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == {"step-1"} and step_of(latest(tmp_path)) == 1


def test_a_prune_that_fails_does_not_fail_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    assert put(tmp_path, 3, fault=full_disk("during-prune")) == tmp_path / "step-3"
    assert "pruning failed" in caplog.text


def test_a_copy_that_does_not_read_back_is_removed_before_anything_older(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)

    def rot(reached: str) -> None:
        if reached == "after-rename":
            (tmp_path / "step-3" / "state.json").write_text("{}")

    assert put(tmp_path, 3, fault=rot) is None
    assert names(tmp_path) == {"step-1", "step-2"}


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    parts = [
        {"params": list(model[0].parameters()), "lr": 0.03},
        {"params": list(model[2].parameters()), "weight_decay": 0.3},
    ]
    return torch.optim.AdamW(parts, lr=0.01, betas=(0.8, 0.95))


def trained(steps: int, resume: Callable[..., None] | None = None, at: int = 4) -> list[Tensor]:
    """Train a small net; `resume(model, optimizer)` may exchange the optimizer's state at `at`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    optimizer = two_groups(model)
    inputs = torch.randn(steps, 6, 5)
    for step in range(steps):
        if resume is not None and step == at:
            optimizer = resume(model, optimizer)
        model(inputs[step]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def resumed(folder: Path, drop: str = "") -> Callable[..., torch.optim.Optimizer]:
    def resume(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        tensors, state = optimizer_tensors(optimizer, model.named_parameters())
        save(folder, 1, tensors={"optimizer": tensors}, state=state, keep=2)
        groups, state = load(latest(folder))
        kept = {
            name: torch.zeros_like(tensor) if drop and name.endswith(drop) else tensor
            for name, tensor in groups["optimizer"].items()
        }
        fresh = two_groups(model)
        load_optimizer(fresh, dict(model.named_parameters()), kept, state)
        return fresh

    return resume


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_resumed_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    assert same(trained(10), trained(10, resumed(tmp_path)))


@pytest.mark.case("F5", control=True)
@pytest.mark.parametrize("drop", ["/exp_avg", "/exp_avg_sq", "/step"])
def test_a_resume_without_part_of_the_state_differs(tmp_path: Path, drop: str) -> None:
    assert not same(trained(10), trained(10, resumed(tmp_path, drop=drop)))


def test_an_optimizer_that_has_not_stepped_is_restored_as_such(tmp_path: Path) -> None:
    assert same(trained(3), trained(3, resumed(tmp_path), at=0))


def test_an_optimizer_that_has_stepped_can_go_back_to_the_start() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    start = optimizer_tensors(optimizer, [("w", weight)])
    weight.sum().backward()
    optimizer.step()
    load_optimizer(optimizer, [("w", weight)], *start)
    assert not optimizer.state


@pytest.mark.case("F9")
def test_the_optimizers_dtypes_and_plain_numbers_come_back() -> None:
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"exp_avg": torch.rand(3), "step": 5, "note": None}
    tensors, state = optimizer_tensors(optimizer, [("w", weight)])
    other = torch.optim.SGD([weight])
    load_optimizer(other, [("w", weight)], tensors, json.loads(json.dumps(state)))
    restored = other.state[weight]
    assert restored["exp_avg"].dtype == torch.float32
    assert torch.equal(restored["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert restored["step"] == 5 and restored["note"] is None


def test_an_optimizer_of_other_parameters_is_refused_with_their_names() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    tensors, state = optimizer_tensors(torch.optim.AdamW(one.parameters()), one.named_parameters())
    with pytest.raises(Refusal, match="bias"):
        load_optimizer(torch.optim.AdamW(two.parameters()), two.named_parameters(), tensors, state)


def test_a_run_is_locked_while_it_lives_and_free_after(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with RunLock(run_dir), pytest.raises(Refusal, match=holder):
        RunLock(run_dir).__enter__()
    with RunLock(run_dir):
        pass


HOLD = """
import sys, time
from pathlib import Path
from gossamer.train.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


@pytest.mark.case("F11")
def test_another_process_holds_the_lock_until_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", HOLD, tmp_path]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(3):
            with pytest.raises(Refusal, match=f"process {holder.pid}"):
                RunLock(tmp_path).__enter__()
        written = (tmp_path / "run.lock").read_text()
        (tmp_path / "run.lock").write_text("")
        with pytest.raises(Refusal, match="run_dir"):
            RunLock(tmp_path).__enter__()
        (tmp_path / "run.lock").write_text(written)
    finally:
        holder.kill()
        holder.wait()
    with RunLock(tmp_path):
        assert f"process {holder.pid}, which died" in caplog.text


@pytest.mark.case("F11")
def test_a_reused_process_id_does_not_hold_the_lock(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(f"{os.getpid()} {this_machine()} 1")
    with RunLock(tmp_path):
        pass


@pytest.mark.case("F11")
def test_a_lock_of_another_machine_is_respected_while_it_beats_and_taken_over_when_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the file system passes locks on, or does not: here nobody locks the file."""
    monkeypatch.setattr(run_lock, "STALE", 0.6)
    lock = tmp_path / "run.lock"
    lock.write_text("12 elsewhere/1 345 7")
    alive = threading.Timer(0.3, lambda: lock.write_text("12 elsewhere/1 345 8"))
    alive.start()
    with pytest.raises(Refusal, match=r"process 12 on elsewhere;.*delete run\.lock"):
        RunLock(tmp_path).__enter__()
    alive.join()
    with RunLock(tmp_path):
        assert "waiting 0.6 s" in caplog.text and "process 12, which died" in caplog.text
        assert lock.read_text().split()[:2] == [str(os.getpid()), this_machine()]


def test_a_lock_beats_and_machines_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    with RunLock(tmp_path) as lock:
        said = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], env=ENVIRONMENT)
        assert said.returncode == 7
        assert (tmp_path / "run.lock").read_text().split()[:3] == lock.holder.split()
    assert (tmp_path / "run.lock").read_text() == ""


ELSEWHERE = """
import fcntl, sys
from pathlib import Path
from gossamer.train import run_lock
from gossamer.train.refusal import Refusal
fcntl.lockf = lambda *args: None  # a file system that does not pass locks on
run_lock._BOOT = Path("/proc/version")  # another machine of the same name
run_lock.STALE = 1.0
try:
    run_lock.RunLock(Path(sys.argv[1])).__enter__()
except Refusal:
    sys.exit(7)
"""


DEAD = f"99999999 {this_machine()} 5"


@pytest.mark.case("F11")
@pytest.mark.parametrize("content", ["", "12", "12 elsewhere", "\x00\x00 \x00", DEAD])
def test_a_half_written_or_dead_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    with RunLock(tmp_path):
        pass
