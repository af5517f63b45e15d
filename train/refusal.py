"""The exceptions for what a user can mend: the command line turns each into one line and a code."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from gossamer.train.redact import redact


class Refusal(ValueError):
    """Say which field is wrong, its value, what is allowed and how to mend it, in one line.

    Credentials in URLs are left out.
    """

    code = 2

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        line = " ".join(f"{field}={value!s}: allowed is {allowed}; {fix}".split())
        super().__init__(redact(line))
        self.field = field

    def by(self, who: str) -> "Refusal":
        """Return the same refusal with a word on who met it."""
        return _restored(type(self), f"{self} ({who})", self.field)

    def __reduce__(self) -> tuple[Any, tuple[type, str, str]]:
        return _restored, (type(self), str(self), self.field)


class DiskFailed(Refusal):
    """A disk that takes no checkpoint any more."""

    code = 3


class OutOfMemory(Refusal):
    """A device whose memory does not hold the run."""

    code = 4


def in_one_line(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Let a program's main say a refusal on stderr and return its code."""

    @wraps(main)
    def run(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except Refusal as refusal:
            sys.stderr.write(f"error: {refusal}\n")
            return refusal.code

    return run


def _restored(kind: type[Refusal], message: str, field: str) -> Refusal:
    """Return a refusal that comes from another process."""
    refusal = kind.__new__(kind, message)
    refusal.field = field
    return refusal
