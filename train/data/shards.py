"""What encoded data is on disk: checksummed parquet shards, and a manifest written last."""

import dataclasses
import hashlib
import json
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
    """One parquet file of one split."""

    file: str
    sha256: str
    rows: int
    split: str


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
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refusal(
                str(path), "unreadable", "a whole manifest", f"encode again: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write atomically: the act that makes the data count as finished."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_atomic(folder / MANIFEST, text + "\n")

    def verify(self, folder: Path) -> None:
        """Refuse if any shard is missing or differs by a byte."""
        for shard in self.shards:
            path = folder / shard.file
            found = sha256(path) if path.is_file() else "missing"
            if found != shard.sha256:
                raise Refusal(
                    f"shard {path}",
                    f"SHA-256 {found[:12]}",
                    f"{shard.sha256[:12]} of the manifest",
                    "the shard is damaged: delete the folder and run gossamer encode again",
                )


@dataclass(eq=False)
class ShardWriter:
    """Collects rows into shards of one split each; a shard appears whole or not at all."""

    folder: Path
    rows_per_shard: int
    metadata: dict[str, str]
    shards: list[Shard] = field(default_factory=list)
    _waiting: dict[str, list[Row]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        waiting = self._waiting.setdefault(row.split, [])
        waiting.append(row)
        size = len(waiting) * (len(row.latent) + len(row.condition) + len(row.text))
        if len(waiting) >= self.rows_per_shard or size >= SHARD_BYTES:
            self._flush(row.split)

    def close(self) -> list[Shard]:
        """Write what is left; returns every shard."""
        for split in sorted(self._waiting):
            self._flush(split)
        return self.shards

    def _flush(self, split: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self._waiting.pop(split, [])
        if not rows:
            return
        number = sum(shard.split == split for shard in self.shards)
        path = self.folder / f"{split}-{number:05d}.parquet"
        columns = {name: [getattr(row, name) for row in rows] for name in schema().names}
        table = pa.table(columns, schema=schema().with_metadata(self.metadata))
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_page_checksum=True,
        )
        content = sink.getvalue().to_pybytes()
        write_atomic(path, content)
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append(Shard(path.name, digest, len(rows), split))


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
