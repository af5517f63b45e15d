"""Several machines: what they do not share is refused in one line, and who is gone is named."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.train import pulse
from gossamer.train.refusal import Refusal

pytestmark = pytest.mark.multi

SECONDS = 60


def start(launcher: Any, commands: list[list[str]], inject: str = "") -> list[Any]:
    """Start one process a machine, each with its own command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    many = str(len(commands))
    common = {"WORLD_SIZE": many, "GROUP_WORLD_SIZE": many, "LOCAL_WORLD_SIZE": "1"}
    common |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        launcher.start(command, env={**common, "RANK": str(rank)}, inject=inject)
        for rank, command in enumerate(commands)
    ]


def refused(jobs: list[Any]) -> str:
    """Require that all end with code 2 and the first alone says why, in one line; return it."""
    first, *others = (job.wait() for job in jobs)
    assert [done.code for done in (first, *others)] == [2] * len(jobs)
    assert len(first.errors) == 1 and "Traceback" not in first.text, first.text
    assert not any(done.errors for done in others)
    return str(first.errors[0])


@pytest.mark.case("R8")
def test_other_settings_on_one_machine_are_refused(lab: Any, launcher: Any, tmp_path: Path) -> None:
    commands = [lab.student(tmp_path, optimizer__lr=lr) for lr in (1e-3, 1e-2)]
    said = refused(start(launcher, commands))
    assert "optimizer.lr=0.001 in process 0, 0.01 in process 1: allowed is the same" in said
    assert not any(tmp_path.iterdir())


@pytest.mark.case("R8")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other_disk_in_process_1", "allowed is one folder that all machines share"),
        ("refusal_in_process_1", "model.path=/nowhere: allowed is a folder; copy it"),
    ],
)
def test_what_one_machine_lacks_is_refused_by_all(
    name: str, said: str, lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    jobs = start(launcher, [lab.student(tmp_path)] * 2, injection(name))
    line = refused(jobs)
    assert said in line and f"(process 1 on {socket.gethostname()})" in line
    assert not (tmp_path / "student" / "checkpoints").exists()


@pytest.mark.case("R8")
def test_a_machine_that_is_gone_is_named_without_a_traceback(
    lab: Any, launcher: Any, injection: Any, tmp_path: Path
) -> None:
    commands = [lab.student(tmp_path, steps=5000)] * 2
    first, second = start(launcher, commands, injection("impatient_pulse"))
    metrics = tmp_path / "student" / "metrics.jsonl"
    first.when(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 2)
    second.kill()
    done = first.wait()
    assert done.code == 1 and "Traceback" not in done.text, done.text
    (line,) = done.errors
    assert f"process 1 on {socket.gethostname()} has not been heard of" in line
    assert line.endswith("ending process 0")


def test_processes_that_cannot_reach_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=r"timed out.*GLOO_SOCKET_IFNAME"), pulse.meeting():
        raise RuntimeError("Gloo connectFullMesh failed with timed out connecting")
    with pytest.raises(RuntimeError, match="another"), pulse.meeting():
        raise RuntimeError("another")


def test_the_meeting_opens_its_store_before_any_thread_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To open one reads environment variables, which accelerate sets: a thread would crash."""
    openers: list[threading.Thread] = []

    class Store:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            openers.append(threading.current_thread())

        def check(self, keys: list[str]) -> bool:
            return False

    monkeypatch.setattr(pulse.dist, "TCPStore", Store)
    here = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    with pulse.meeting():
        assert openers == [threading.current_thread()]


@pytest.mark.case("R8")
def test_a_process_does_not_wait_at_a_place_that_is_gone(tmp_path: Path) -> None:
    """The first machine's launcher ends before all have met."""
    script = (
        "import os, subprocess, sys, time, torch.distributed as dist\n"
        "from gossamer.train import pulse\n"
        "pulse.BEAT, pulse.GRACE = 0.1, 0.1\n"
        "host = subprocess.Popen([sys.executable, '-c', 'import sys, torch.distributed as dist\\n"
        'store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, '
        "wait_for_workers=False)\\nprint(1, flush=True)\\nsys.stdin.read()', "
        "os.environ['MASTER_PORT']], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "host.stdout.readline()\n"
        "with pulse.meeting(): time.sleep(1); host.kill(); time.sleep(50)"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 2 and "ended before all had met" in done.stderr


@pytest.fixture
def machines(lab: Any, tmp_path: Path) -> Any:
    """Return a function that starts `accelerate launch` of one process on each of two machines."""

    def start(*words: object) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs = []
        for rank in range(2):
            home = tmp_path / f"machine-{rank}"
            home.mkdir(exist_ok=True)
            options = f"--multi_gpu --num_processes 2 --num_machines 2 --machine_rank {rank}"
            options += f" --main_process_ip 127.0.0.1 --main_process_port {port}"
            options += " --mixed_precision no --dynamo_backend no -m gossamer.train"
            command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
            places = {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(lab.source)}
            jobs.append(
                subprocess.Popen(
                    [*command, *map(str, words)],
                    cwd=home,
                    env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return jobs

    return start


@pytest.mark.full
@pytest.mark.case("R8")
def test_two_launchers_give_the_losses_of_one_process_and_end_together(
    lab: Any, launcher: Any, machines: Any, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert launcher.run(lab.student(one)).code == 0
    jobs = machines(*lab.student(two))
    texts = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], texts
    ours, alone = (np.array(lab.run(runs).losses) for runs in (two, one))
    np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=0)
    jobs = machines(*lab.student(tmp_path / "killed", steps=50_000))
    metrics = tmp_path / "killed" / "student" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    children = Path(f"/proc/{jobs[1].pid}/task/{jobs[1].pid}/children").read_text().split()
    for pid in [*map(int, children), jobs[1].pid]:
        os.kill(pid, signal.SIGKILL)
    text = jobs[0].communicate(timeout=SECONDS)[0]
    assert jobs[0].returncode and "process 1 on " in text and "[rank0]" not in text, text
    jobs[1].communicate()
