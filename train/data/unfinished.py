"""What an encode that ended early leaves to the next one: its whole shards."""

import dataclasses
import json
from pathlib import Path

from gossamer.train.data.shards import FORMAT_VERSION, SHARD_NAME, Shard
from gossamer.train.files import write_atomic

BEGUN = "begun.json"  # the request, and the shards so far


def note(folder: Path, request: dict, shards: list[Shard]) -> None:
    """Write down which shards of the request are whole."""
    values = [dataclasses.asdict(shard) for shard in shards]
    begun = {"format_version": FORMAT_VERSION, "request": request, "shards": values}
    write_atomic(folder / BEGUN, json.dumps(begun, ensure_ascii=False))


def left(folder: Path, request: dict) -> list[Shard]:
    """Return the shards of the same request, or none where one of them is damaged.

    Rows come in one order, so those of the shards are the first of their split and size.
    """
    try:
        begun = json.loads((folder / BEGUN).read_text())
        same = (begun["format_version"], begun["request"]) == (FORMAT_VERSION, request)
        shards = [Shard(**shard) for shard in begun["shards"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    is_whole = all(SHARD_NAME.fullmatch(s.file) and not s.difference(folder) for s in shards)
    return shards if is_whole else []
