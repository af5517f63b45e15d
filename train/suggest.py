"""The nearest known word, for refusals."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, or nothing; a dotted key also by its last part."""
    known = list(known)
    leaf = word.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    leaves = get_close_matches(leaf, {name.rpartition(".")[2] for name in known}, 1, 0.75)
    close = (
        same_leaf
        or get_close_matches(word, known, 1, 0.6)
        or [name for name in known if leaves and name.rpartition(".")[2] == leaves[0]]
    )
    return f"did you mean {close[0]}?" if close else ""
