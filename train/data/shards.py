"""What encoded data is on disk: checksummed parquet shards, and a manifest written last."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, get_type_hints

import torch
from torch import Tensor

from gossamer.train.files import sha256, write_atomic
from gossamer.train.refusal import Refusal

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHARD_BYTES = 512 * 2**20  # a parquet binary column is limited to 2 GiB
GROUP_BYTES = 4 * 2**20  # of a row group, the least that is read at once
SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.parquet")


@dataclass(frozen=True)
class Row:
    """One encoded clip; a field is a parquet column. Tensors are bf16 bytes with their shape."""

    clip_id: str
    source: str
    start: int
    frames: int
    fps: float
    height: int
    width: int
    shot_start: int
    shot_end: int
    split: str
    augment: str
    latent: bytes
    latent_shape: list[int]
    condition: bytes
    condition_shape: list[int]
    text: bytes  # without the rows of padding, which reading adds again
    text_shape: list[int]
    prompt: str
    content_sha256: str  # of the clip's pixels


@dataclass(frozen=True)
class Shard:
    """One parquet file of one split and one size of clips."""

    file: str
    sha256: str
    rows: int
    split: str
    bytes: int = 0  # 0: not known
    latent_shape: list[int] = field(default_factory=list)  # [] in data of a single size

    def difference(self, folder: Path) -> str | None:
        """Say how the file in the folder differs from the shard; None where it does not."""
        path = folder / self.file
        try:
            if not path.is_file():
                return "missing"
            size = path.stat().st_size
            if self.bytes and size != self.bytes:
                return f"{size} bytes instead of {self.bytes}"
            found = sha256(path)
        except OSError as error:
            return str(error)
        if found != self.sha256:
            return f"SHA-256 {found[:12]} instead of {self.sha256[:12]}"
        return None


@dataclass(frozen=True)
class Manifest:
    """Everything that identifies encoded data; without it a folder counts as unfinished."""

    request: dict  # what was asked for: settings, sources with SHA-256, codec and text fingerprints
    codec: dict  # fingerprint, channels, compression
    text: dict  # fingerprint, length, dim
    sources: list[dict]  # name, frames, shots of each video that was used
    shards: list[Shard]
    splits: dict[str, int]
    skipped_shots: int = 0
    bad_clips: int = 0
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read a folder's manifest; None where there is none."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise Refusal(
                    str(path), f"format {version}", f"format {FORMAT_VERSION}", "encode again"
                )
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            for shard in values["shards"]:
                if not SHARD_NAME.fullmatch(shard.file):
                    raise TypeError(f"{shard.file!r} is no name of a shard")
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refusal(
                str(path), "unreadable", "a whole manifest", f"encode again: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write atomically: the act that makes the data count as finished."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_atomic(folder / MANIFEST, text + "\n")

    def damaged(self, folder: Path) -> list[tuple[Shard, str]]:
        """Return each shard that is missing or differs by a byte, and how."""
        found = ((shard, shard.difference(folder)) for shard in self.shards)
        return [(shard, difference) for shard, difference in found if difference]


@dataclass(eq=False)
class ShardWriter:
    """Collects rows into shards of one split and one latent shape each, written whole or not."""

    folder: Path
    rows_per_shard: int
    metadata: dict[str, str]
    shards: list[Shard] = field(default_factory=list)
    _waiting: dict[tuple[str, tuple[int, ...]], list[Row]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        key = (row.split, tuple(row.latent_shape))
        waiting = self._waiting.setdefault(key, [])
        waiting.append(row)
        if len(waiting) >= self.rows_per_shard or len(waiting) * _size(row) >= SHARD_BYTES:
            self._flush(key)

    def close(self) -> list[Shard]:
        """Write what is left; returns every shard."""
        for key in sorted(self._waiting):
            self._flush(key)
        return self.shards

    def _flush(self, key: tuple[str, tuple[int, ...]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, split = self._waiting.pop(key), key[0]
        number = sum(shard.split == split for shard in self.shards)
        path = self.folder / f"{split}-{number:05d}.parquet"
        columns = {name: [getattr(row, name) for row in rows] for name in schema().names}
        table = pa.table(columns, schema=schema().with_metadata(self.metadata))
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            row_group_size=max(1, GROUP_BYTES // _size(rows[0])),
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_page_checksum=True,
        )
        content = sink.getvalue().to_pybytes()
        write_atomic(path, content)
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append(Shard(path.name, digest, len(rows), split, len(content), list(key[1])))


def _size(row: Row) -> int:
    return len(row.latent) + len(row.condition) + len(row.text) + 1


def schema() -> "pyarrow.Schema":
    """The columns of a shard, in the order of Row."""
    import pyarrow as pa

    types: dict[object, pa.DataType] = {
        str: pa.string(),
        int: pa.int32(),
        float: pa.float64(),
        bytes: pa.binary(),
        list[int]: pa.list_(pa.int32()),
    }
    return pa.schema([(name, types[kind]) for name, kind in get_type_hints(Row).items()])


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor as bf16 bytes in C order."""
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def from_bytes(content: bytes, shape: list[int]) -> Tensor:
    """bf16 bytes -> fp32 tensor."""
    if not content:
        return torch.zeros(*shape)
    return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(*shape).float()
