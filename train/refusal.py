"""The one exception for bad input: the command line turns it into one line and exit code 2."""

from typing import Any

from gossamer.train.redact import redact


class Refusal(ValueError):
    """Say which field is wrong, its value, what is allowed and how to mend it, in one line.

    Credentials in URLs are left out.
    """

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        line = " ".join(f"{field}={value!s}: allowed is {allowed}; {fix}".split())
        super().__init__(redact(line))
        self.field = field

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return _restored, (str(self), self.field)


def _restored(message: str, field: str) -> Refusal:
    """Return a refusal that comes from another process."""
    refusal = Refusal.__new__(Refusal, message)
    refusal.field = field
    return refusal
