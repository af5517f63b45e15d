"""Ends that somebody asks for: SIGTERM and SIGINT (Ctrl-C)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDS = (signal.SIGTERM, signal.SIGHUP)
ECHO = 5.0  # seconds


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT."""


class Stop:
    """Whether a training was asked to stop: in this process, and as all processes agreed."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    @property
    def votes(self) -> list[float]:
        """Return 1 for the signal of SIGNALS that this process got, else 0."""
        return [float(self.asked is number) for number in SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """Take the sum or mean of the votes of all processes."""
        self.agreed = next((n for n, vote in zip(SIGNALS, votes, strict=True) if vote), None)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note the first signal in a Stop and go on; a second one ends the process at once.

    A second SIGTERM within ECHO seconds is still the first: a cluster tells every process, and the
    launcher, told as well, tells its own again. A signal that came too late to be agreed on acts
    after the block, as it would outside. Python sees signals between calls: one during a long wait
    for a device or a peer counts after it.
    """
    stop = Stop()
    since = time.monotonic()

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if stop.asked is None:
            stop.asked, since = signal.Signals(number), time.monotonic()
            may_echo = number == signal.SIGTERM
            for each in SIGNALS[1:] if may_echo else SIGNALS:
                if signal.getsignal(each) is not signal.SIG_IGN:
                    signal.signal(each, signal.SIG_DFL)
        elif time.monotonic() - since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(signal.Signals(number))

    with _handled(ask, SIGNALS):
        yield stop
    if stop.asked and not stop.agreed:
        signal.raise_signal(stop.asked)


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated at SIGTERM, and at the SIGHUP of a terminal that closes."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled(end, ENDS):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    """Handle signals, except ignored ones, in the main thread; put back what was there before."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if is_main}
    before = {n: old for n, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def leave_to_parent(worker: int) -> None:
    """Let a data worker outlive signals to its whole group: only its parent's SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[:1])
    parent = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo(SIGNALS[:1]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
