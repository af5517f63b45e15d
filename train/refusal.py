"""The exceptions for what a user can mend: the command line turns each into one line and a code."""


class Refusal(ValueError):
    """Say which field is wrong, its value, what is allowed and how to mend it, in one line."""

    code = 2

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        super().__init__(" ".join(f"{field}={value!s}: allowed is {allowed}; {fix}".split()))
        self.field = field


class DiskFailed(Refusal):
    """A disk that takes no checkpoint any more."""

    code = 3


class OutOfMemory(Refusal):
    """A device whose memory does not hold the run."""

    code = 4
