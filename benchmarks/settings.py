"""The settings of one benchmark, read from key=value arguments."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gossamer.benchmarks.cases import MIN_SKEWED_SPARSITY, ROWS, SHAPES, Shape
from gossamer.benchmarks.contestants import CONTESTANTS
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

PHASES = ("forward", "backward", "lists", "mask", "total")
RESULTS = ("results.md", "results.json")
HELP = {
    "shape": f"{', '.join(SHAPES)}, or HEADSxTOKENSxDIM",
    "block": "tokens of a q block x tokens of a kv block",
    "sparsity": f"0, or {MIN_SKEWED_SPARSITY} to below 1 with skewed rows",
    "rows": "uniform: as many blocks in every row; skewed: 7-fold, with sinks; clusters: blocks of "
    "any size around block, other ones in each head",
    "contestant": ", ".join(CONTESTANTS),
    "phase": "lists is a part of mask; total is mask, forward and backward in one run",
    "seconds": "start nothing new after this long; a first compilation may overrun it",
    "commit": "named in the results; found by git if left out",
    "out": "folder for results.md and results.json; runs/bench-TIME if left out",
}


@dataclass(frozen=True)
class Settings:
    shape: tuple[Shape, ...] = (SHAPES["A"],)
    block: tuple[tuple[int, int], ...] = ((64, 64), (128, 64), (128, 128))
    sparsity: tuple[float, ...] = (0.9, 0.95)
    rows: tuple[str, ...] = ("uniform", "skewed")
    contestant: tuple[str, ...] = tuple(CONTESTANTS)
    phase: tuple[str, ...] = PHASES
    seconds: float = float("inf")
    commit: str = ""
    out: Path | None = None

    def folder(self) -> Path:
        """Return the folder to write to, made; refuse one that holds results."""
        out = self.out or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
        if out.is_file() or any((out / name).exists() for name in RESULTS):
            raise Refusal("out", out, "a folder without results", f"write out={out}-2")
        out.mkdir(parents=True, exist_ok=True)
        return out


def parse(arguments: Sequence[str]) -> Settings:
    """Read key=value arguments; values of a list are separated by commas."""
    readers: dict[str, Callable[[str], Any]] = {
        "shape": lambda text: _each(text, _shape),
        "block": lambda text: _each(text, _block),
        "sparsity": lambda text: _each(text, _sparsity),
        "rows": lambda text: _each(text, lambda word: _known("rows", word, ROWS)),
        "contestant": lambda text: _each(
            text, lambda word: _known("contestant", word, tuple(CONTESTANTS))
        ),
        "phase": lambda text: _each(text, lambda word: _known("phase", word, PHASES)),
        "seconds": _seconds,
        "commit": str,
        "out": Path,
    }
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in readers:
            fix = nearest(key, readers) or "see gossamer bench --help"
            raise Refusal("key", key, ", ".join(readers), fix)
        if not equals or not text:
            example = _text(getattr(Settings(), key)) or "..."
            raise Refusal(key, text, "a value", f"write {key}={example}")
        given[key] = readers[key](text)
    settings = Settings(**given)
    _check_skew(settings)
    return settings


def describe(settings: Settings) -> str:
    """Return the settings as YAML, each with its meaning."""
    return "".join(
        f"{field.name}: {_text(getattr(settings, field.name))}  # {HELP[field.name]}\n"
        for field in fields(Settings)
    )


def usage() -> str:
    """Return the help text of the verb, after its first line."""
    return (
        "usage: gossamer bench [key=value ...]\n"
        "for example: gossamer bench shape=A,B sparsity=0.95 contestant=dense-cudnn,triton\n\n"
        f"keys, with what they are if left out:\n{describe(Settings())}"
    )


def _each(text: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(read(word) for word in text.split(",")))


def _known(field: str, word: str, known: tuple[str, ...]) -> str:
    if word not in known:
        fix = nearest(word, known) or f"write {field}={known[0]}"
        raise Refusal(field, word, ", ".join(known), fix)
    return word


def _shape(word: str) -> Shape:
    if word in SHAPES:
        return SHAPES[word]
    if not (sizes := _sizes(word, 3)):
        fix = nearest(word, SHAPES) or "write shape=A or, say, shape=12x32760x128"
        raise Refusal("shape", word, HELP["shape"], fix)
    return Shape(word, *sizes)


def _block(word: str) -> tuple[int, int]:
    if not (sizes := _sizes(word, 2)):
        raise Refusal("block", word, "two sizes of at least 1 token", "write block=128x64")
    return sizes[0], sizes[1]


def _sizes(word: str, count: int) -> tuple[int, ...]:
    sizes = word.split("x")
    is_valid = len(sizes) == count and all(re.fullmatch(r"[1-9]\d*", size) for size in sizes)
    return tuple(map(int, sizes)) if is_valid else ()


def _sparsity(word: str) -> float:
    value = _number(word)
    if not 0 <= value < 1:
        fix = f"write sparsity={value / 100:g}" if 1 < value < 100 else "write sparsity=0.9"
        raise Refusal("sparsity", word, "a share from 0 to below 1", fix)
    return value


def _seconds(word: str) -> float:
    if not (value := _number(word)) > 0:
        raise Refusal("seconds", word, "a number above 0", "write seconds=600")
    return value


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _check_skew(settings: Settings) -> None:
    dense = [value for value in settings.sparsity if 0 < value < MIN_SKEWED_SPARSITY]
    if dense and "skewed" in settings.rows:
        raise Refusal("sparsity", dense[0], HELP["sparsity"], "write rows=uniform")


def _text(value: object) -> str:
    if isinstance(value, Shape):
        return value.name
    if isinstance(value, tuple):
        is_block = bool(value) and isinstance(value[0], int)
        return ("x" if is_block else ",").join(map(_text, value))
    return "" if value is None else str(value)
