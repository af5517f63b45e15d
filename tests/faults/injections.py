"""Faults and broken protections, put into a job before it starts (see the launcher's `inject`)."""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from gossamer.train import checkpoint, files, health, interrupt, loop, pulse, run, run_lock, stages
from gossamer.train.data import dataset
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.losses import VelocityDistillation
from gossamer.train.refusal import Refusal

BAD_STEP = 3


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def at_loss(number: int, change: Callable[[Any], Any], *, of: int = 0) -> None:
    """Change the `number`-th loss of one process; of a resumed run it is counted anew."""
    compute, calls = VelocityDistillation.__call__, iter(range(1, 10**9))

    def changed(self: Any, *args: Any) -> Any:
        loss = compute(self, *args)
        return change(loss) if next(calls) == number and rank() == of else loss

    VelocityDistillation.__call__ = changed  # type: ignore[method-assign]


def nan_in_process_1() -> None:
    """The value alone: gradients stay finite, so only the losses can tell the other process."""
    at_loss(BAD_STEP, lambda loss: loss + torch.tensor(float("nan")), of=1)


def nan_in_process_1_and_no_agreement() -> None:
    nan_in_process_1()
    loop.averaged = lambda numbers, accelerator: list(numbers)
    loop.tell = lambda *args: None


def failing_batch() -> None:
    def fail(loss: Any) -> Any:
        raise ValueError("a bad batch")

    at_loss(BAD_STEP, fail, of=1)


def impatient_pulse() -> None:
    pulse.BEAT, pulse.LIMIT, pulse.GRACE = 0.2, 3.0, 0.5


def other_disk_in_process_1() -> None:
    """Process 1 does not see what process 0 writes into the run's folder."""
    files.SEEN = 0.5
    if rank() == 1:
        run_lock._read = lambda path: b""


def refusal_in_process_1() -> None:
    preflight = run.preflight

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if rank() == 1:
            raise Refusal("model.path", "/nowhere", "a folder", "copy it")
        return preflight(*args, **kwargs)

    run.preflight = refuse  # type: ignore[assignment]


def no_pulse() -> None:
    pulse.Pulse.__enter__ = lambda self: self  # type: ignore[method-assign]


def other_data_in_process_1() -> None:
    start = LatentDataset.__init__

    def other(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if rank() == 1:
            request = {**self.manifest.request, "source": "another"}
            self.manifest = replace(self.manifest, request=request)

    LatentDataset.__init__ = other  # type: ignore[method-assign]


def other_data_unchecked() -> None:
    other_data_in_process_1()
    stages.check_same = lambda *args: None


def out_of_memory() -> None:
    def fail(loss: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    at_loss(1, fail)


def out_of_memory_unhandled() -> None:
    out_of_memory()
    run.within_memory = lambda *args: nullcontext()  # type: ignore[assignment]


def small_files() -> None:
    """No file can grow past 20 kB, as on a disk that is full once the first step is saved."""
    write, calls = checkpoint._write, iter(range(1, 10**9))

    def limited(*args: Any) -> Any:
        if next(calls) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return write(*args)

    checkpoint._write = limited  # type: ignore[assignment]


def read_only_after_a_save() -> None:
    write, calls = checkpoint.write, iter(range(1, 10**9))

    def refused(*args: Any) -> Any:
        if next(calls) > 3:
            raise OSError(errno.EROFS, "Read-only file system")
        return write(*args)

    checkpoint.write = refused


def in_write_of_process_1(number: int, act: Callable[[], None]) -> None:
    """Act in the middle of the `number`-th file of a checkpoint that process 1 writes."""
    write, calls = checkpoint.write, iter(range(1, 10**9))

    def changed(path: Any, tensors: Any) -> Any:
        if rank() == 1 and next(calls) == number:
            path.write_bytes(b"half")
            act()
        return write(path, tensors)

    checkpoint.write = changed


def process_1_dies_in_its_third_save() -> None:
    in_write_of_process_1(8, lambda: os.kill(os.getpid(), signal.SIGKILL))


def disk_of_process_1_is_full_once() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    in_write_of_process_1(2, full)


def only_its_own_disk_counts() -> None:
    """Process 1 alone sees its failure: the first one publishes what is not all there."""
    disk_of_process_1_is_full_once()
    done = checkpoint._do

    def hidden(work: Any, *args: Any, **kwargs: Any) -> Any:
        def silent() -> Any:
            with suppress(OSError):
                return work()

        return done(silent, *args, **kwargs)

    checkpoint._do = hidden


def failed_saves_pass_for_good() -> None:
    small_files()
    save = checkpoint.save
    checkpoint.save = lambda *args, **kwargs: save(*args, **kwargs) or args[0]  # type: ignore


def no_echo() -> None:
    interrupt.ECHO = 0.0


def schedule_from_zero() -> None:
    lr_at = loop.TrainSettings.lr_at
    loop.TrainSettings.lr_at = lambda self, step: lr_at(self, step - 12)  # type: ignore


def samples_from_zero() -> None:
    batches = dataset.batches

    def again(*args: Any, **kwargs: Any) -> Any:
        return batches(*args, **{**kwargs, "start_step": 0})

    loop.batches = again


def noise_from_zero() -> None:
    arange = torch.arange
    torch.arange = lambda *args, **kw: arange(  # type: ignore
        *((args[0] % 4, args[0] % 4 + args[1] - args[0]) if len(args) == 2 else args), **kw
    )


def offline() -> None:
    """Take this process into a network namespace without interfaces; else guard its sockets."""
    import ctypes

    new_user, new_net = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_net) and libc.unshare(new_user | new_net):
        import socket

        def refuse(self: Any, address: Any) -> None:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

        socket.socket.connect = refuse  # type: ignore[method-assign]


def offline_that_needs_a_server() -> None:
    """Connect as a download would: the isolation must show."""
    import socket

    offline()
    socket.create_connection(("127.0.0.1", int(os.environ["SERVER_PORT"])), timeout=5).close()


def needs_a_server() -> None:
    import socket

    socket.create_connection(("127.0.0.1", int(os.environ["SERVER_PORT"])), timeout=5).close()


def in_a_folder_that_cannot_be_written() -> None:
    os.chdir("/proc")


def clock_that_jumps_back() -> None:
    start = time.time()
    calls = iter(range(10**9))
    time.time = lambda: start - 3600 * next(calls)  # type: ignore[assignment]


def monotonic_that_jumps_back() -> None:
    monotonic, calls = time.monotonic, iter(range(10**9))
    loop.time = type("Clock", (), {"monotonic": lambda: monotonic() - 3600 * next(calls)})


def leaking() -> None:
    """Keep 200 kB and a file open with each step."""
    kept: list[Any] = []
    judge = health.Health.judge

    def leak(self: Any, *args: Any) -> str:
        kept.append((bytearray(os.urandom(200_000)), os.open(os.devnull, os.O_RDONLY)))
        return judge(self, *args)

    health.Health.judge = leak  # type: ignore[method-assign]
