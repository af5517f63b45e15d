"""What the processes of one run do together."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from gossamer.train.cli import REFUSED
from gossamer.train.refusal import Refusal


@dataclass(frozen=True)
class Together:
    """The processes of a checkpoint: the first `writers` of them have all of its tensors."""

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


def accepted(work: Callable[[], None], together: Together) -> None:
    """Do work in each process; a refusal in any ends all, and the first that has one says why."""
    refusal = None
    try:
        work()
    except Refusal as error:
        refusal = error
    refused = together.gather(refusal is not None)
    if refusal is not None and not any(refused[: together.rank]):
        raise refusal
    if any(refused):
        raise SystemExit(REFUSED)


def agreed(value: bool, accelerator: Accelerator) -> bool:
    """Return the main process's value in every process; waits for all."""
    return bool(broadcast(torch.tensor(int(value), device=accelerator.device)))


def averaged(numbers: list[float], accelerator: Accelerator) -> list[float]:
    """Return the mean of each number over the processes, the same in all."""
    rows = accelerator.gather(torch.tensor([numbers], device=accelerator.device)).tolist()
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def check_same(field: str, value: object, accelerator: Accelerator, fix: str) -> None:
    """Refuse, in all processes, a value that is not the same in each."""
    digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
    all_digests = gather_object([digest])
    if len(set(all_digests)) > 1:
        shown = ", ".join(f"process {rank}: {one}" for rank, one in enumerate(all_digests[:4]))
        raise Refusal(field, shown, "the same for all processes", fix)


def on_main(work: Callable[[], None], accelerator: Accelerator) -> None:
    """Do work in the main process while the others wait; a refusal of it ends them all.

    The others exit as refused without a word, because the main process says why.
    """
    refusal = None
    if accelerator.is_main_process:
        try:
            work()
        except Refusal as error:
            refusal = error
    if agreed(refusal is None, accelerator):
        return
    if refusal is None:
        raise SystemExit(REFUSED)
    raise refusal
