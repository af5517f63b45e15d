"""What the processes of one run do together."""

import hashlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from gossamer.train.cli import REFUSED
from gossamer.train.refusal import Refusal

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Together:
    """The processes of a run: the first `writers` of them have all tensors of a checkpoint."""

    rank: int = 0
    processes: int = 1
    writers: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def writes(self) -> bool:
        return self.rank < self.writers

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process; waits for all."""
        return gather_object([value]) if self.processes > 1 else [value]


ALONE = Together()


def accepted(work: Callable[[], Any], together: Together) -> None:
    """Do work in each process; a refusal in any ends all, and the first process says why."""
    refusal = None
    try:
        work()
    except Refusal as error:
        refusal = error
        if not together.is_first:
            refusal = error.by(f"process {together.rank} on {socket.gethostname()}")
    for first in filter(None, together.gather(refusal)):
        if together.is_first:
            raise first
        raise SystemExit(first.code)


def agreed(value: bool, accelerator: Accelerator) -> bool:
    """Return the main process's value in every process; waits for all."""
    return bool(broadcast(torch.tensor(int(value), device=accelerator.device)))


def averaged(numbers: list[float], accelerator: Accelerator) -> list[float]:
    """Return the mean of each number over the processes, the same in all."""
    rows = accelerator.gather(torch.tensor([numbers], device=accelerator.device)).tolist()
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def check_alike(own: Mapping[str, object], accelerator: Accelerator) -> None:
    """Refuse, in all processes alike, values of which another process has others than the first."""
    first, *others = gather_object([dict(own)])
    for rank, other in enumerate(others, start=1):
        odd = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if odd:
            shown = f"{first.get(odd[0])} in process 0, {other.get(odd[0])} in process {rank}"
            more = f" (also different: {', '.join(odd[1:6])})" if odd[1:] else ""
            fix = f"give every accelerate launch the same command and software{more}"
            raise Refusal(odd[0], shown, "the same for all processes", fix)


def check_same(field: str, value: object, accelerator: Accelerator, fix: str) -> None:
    """Refuse, in all processes, a value that is not the same in each."""
    digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
    all_digests = gather_object([digest])
    if len(set(all_digests)) > 1:
        shown = ", ".join(f"process {rank}: {one}" for rank, one in enumerate(all_digests[:4]))
        raise Refusal(field, shown, "the same for all processes", fix)


def shared_out(
    work: Callable[[Item], Result], items: Iterable[Item], accelerator: Accelerator | None
) -> list[Result]:
    """Return work(item) of all items, in their order: each process does some, and gets all.

    All processes call it, and a refusal of one is raised in all. None: this process does all.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [work(item) for item in items]
    processes, refusal, done = accelerator.num_processes, None, []
    try:
        done = [work(x) for x in islice(items, accelerator.process_index, None, processes)]
    except Refusal as error:
        refusal = error
    parts, refusals = zip(*gather_object([(done, refusal)]), strict=True)
    for refusal in filter(None, refusals):
        raise refusal
    return [parts[i % processes][i // processes] for i in range(sum(map(len, parts)))]


@contextmanager
def said_once(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process alone say a refusal that all raise alike inside."""
    try:
        yield
    except Refusal as refusal:
        if accelerator.is_main_process:
            raise
        raise SystemExit(refusal.code) from refusal


def on_main(work: Callable[[], Result], accelerator: Accelerator) -> Result | None:
    """Return what work gives in the main process, and None in the others, which wait for it.

    A refusal ends them all; the others exit without a word, because the main process says why.
    """
    refusal = result = None
    if accelerator.is_main_process:
        try:
            result = work()
        except Refusal as error:
            refusal = error
    if agreed(refusal is None, accelerator):
        return result
    if refusal is None:
        raise SystemExit(REFUSED)
    raise refusal
