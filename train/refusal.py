"""The one exception for bad input: the command line turns it into one line and exit code 2."""


class Refusal(ValueError):
    """Say which field is wrong, its value, what is allowed and how to mend it, in one line."""

    def __init__(self, field: str, value: object, allowed: str, fix: str) -> None:
        super().__init__(" ".join(f"{field}={value!s}: allowed is {allowed}; {fix}".split()))
        self.field = field
