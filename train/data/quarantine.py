"""Shards and clips that turned out damaged: listed, left out, and too many of them refused."""

import json
import logging
import os
from pathlib import Path

from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

FILE = "quarantine.jsonl"
BAD_SHARE = 0.05


class BadData(Exception):
    """A shard, or only one clip of it, that cannot be used."""

    def __init__(self, reason: str, *, one_clip: bool = False) -> None:
        super().__init__(" ".join(reason.split()))
        self.one_clip = one_clip


class Quarantine:
    """What is left out of a split of `total` clips; a line of `file` for each, if one is given.

    A pure record: which data is bad is decided by the data, so all processes decide alike. What a
    run has listed stays left out, so that it resumes in the same order although it was mended.
    """

    def __init__(self, file: Path | None, folder: Path, split: str, total: int) -> None:
        self._file, self._folder, self._split, self._total = file, folder, split, total
        self._bad: dict[tuple[str, int | None], tuple[int, str]] = {}
        if file is None or not file.is_file():
            return
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                key = (entry["shard"], entry["row"])
                if entry["split"] == split:
                    self._bad[key] = (entry["clips"], entry["reason"])
            except (ValueError, KeyError, TypeError) as error:
                raise Refusal(
                    str(file), line[:60], "lines as it was written", "delete it"
                ) from error
        self._refuse_many()

    def __len__(self) -> int:
        return len(self._bad)

    def holds(self, shard: str, row: int) -> bool:
        return (shard, None) in self._bad or (shard, row) in self._bad

    def add(self, shard: str, row: int, clips: int, error: BadData) -> None:
        """List a shard of so many clips, or one row of it; Refusal when too many clips are bad."""
        key = (shard, row if error.one_clip else None)
        if key in self._bad:
            return
        count = 1 if error.one_clip else clips
        self._bad[key] = (count, str(error))
        what = f"clip {row} of {shard}" if error.one_clip else f"shard {shard} ({clips} clips)"
        log.warning("%s is left out, others take its place: %s", what, error)
        if self._file is not None:
            names = ("split", "shard", "row", "clips", "reason")
            values = (self._split, shard, key[1], count, str(error))
            _append(self._file, json.dumps(dict(zip(names, values, strict=True))))
        self._refuse_many()

    def _refuse_many(self) -> None:
        bad = sum(
            clips
            for (shard, row), (clips, _) in self._bad.items()
            if row is None or (shard, None) not in self._bad
        )
        if bad > BAD_SHARE * self._total:
            raise refuse_many(
                [f"{shard}: {reason}" for (shard, _), (_, reason) in self._bad.items()],
                f"{bad} of {self._total} {self._split} clips in {self._folder}",
            )


def refuse_many(damaged: list[str], clips: str) -> Refusal:
    """Return the refusal of data of which too much is damaged."""
    few = "; ".join(damaged[:20]) + (f"; and {len(damaged) - 20} more" if len(damaged) > 20 else "")
    return Refusal(
        "data.dir",
        f"{clips} damaged ({few})",
        f"at most {BAD_SHARE:.0%}",
        f"copy or encode them again (and delete {FILE} of the run)",
    )


def _append(file: Path, line: str) -> None:
    """Append one line in one write: processes do not mix their lines."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("%s cannot be written: %s", file, error)
