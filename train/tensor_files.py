"""Tensors in safetensors files, whole or in parts of rows; written and read one at a time."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gossamer.train.refusal import Refusal

ROWS = "rows"  # key of a file's metadata: JSON of {tensor: [first row, rows of the whole]}


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor of `total` rows, from row `first` on."""

    tensor: Tensor
    first: int
    total: int


class Source(Protocol):
    """A tensor, or one in files: `[a:b]` are its rows, `[...]` all of it."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, rows: slice | EllipsisType, /) -> Tensor: ...


def write(path: Path, tensors: Mapping[str, Tensor | Rows]) -> dict[str, Any]:
    """Write a safetensors file; return its `sha256`, of what was to be written, and `size`.

    The bytes are on disk when it returns. It holds a copy of one tensor at a time, where
    safetensors' own needs all of them in the memory of the host.
    """
    plain = {n: p.tensor if isinstance(p, Rows) else p for n, p in tensors.items()}
    # Large types first, as safetensors does: each tensor then starts at a multiple of its type.
    names = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    ordered = [plain[name] for name in names]
    parts = ((name, tensors[name]) for name in names)
    rows = {name: [p.first, p.total] for name, p in parts if isinstance(p, Rows)}
    header: dict[str, Any] = {"__metadata__": {ROWS: json.dumps(rows)}} if rows else {}
    end = 0
    for name, tensor in zip(names, ordered, strict=True):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _name_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> int:
            digest.update(data)
            return file.write(data)

        size = put(len(text).to_bytes(8, "little")) + put(text)
        size += sum(put(_bytes(tensor)) for tensor in ordered)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


@dataclass(frozen=True)
class _Part:
    first: int
    total: int
    shape: tuple[int, ...]
    file: Any  # open, of safetensors

    @property
    def last(self) -> int:
        return self.first + (self.shape[0] if self.shape else 1)


class StoredTensor:
    """A tensor in one or more files, of which only the rows that are asked for are read.

    Raises Refusal when its parts do not make up a tensor, hold NaN or infinity, or cannot be read.
    """

    def __init__(self, name: str, group: str, parts: Iterable[_Part]) -> None:
        self._name, self._title = name, f"{group}/{name}"
        self._parts = sorted(parts, key=lambda part: part.first)
        total, inner = self._parts[0].total, self._parts[0].shape[1:]
        ends = [0, *(part.last for part in self._parts)]
        starts = [*(part.first for part in self._parts), total]
        alike = {(part.total, part.shape[1:]) for part in self._parts} == {(total, inner)}
        if starts != ends or not alike:
            given = ", ".join(f"{p.first}-{p.last} of {p.total}" for p in self._parts)
            allowed = "each of a tensor's rows once"
            raise Refusal(f"checkpoint {self._title}", f"rows {given}", allowed, _OLDER)
        self.shape = torch.Size((total, *inner) if self._parts[0].shape else ())

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        try:
            tensor = self._read(rows)
        except (OSError, SafetensorError) as error:
            raise Refusal(f"checkpoint {self._title}", error, "files that read", _OLDER) from None
        if not is_finite(tensor):
            raise not_finite(self._title)
        return tensor

    def _read(self, rows: slice | EllipsisType) -> Tensor:
        if isinstance(rows, EllipsisType) and len(self._parts) == 1:
            whole: Tensor = self._parts[0].file.get_tensor(self._name)
            return whole
        rows = slice(None) if isinstance(rows, EllipsisType) else rows
        first, last, _ = rows.indices(self.shape[0])
        found = []
        for part in self._parts:
            start, end = max(first, part.first), min(last, part.last)
            if start < end:
                stored = part.file.get_slice(self._name)
                found.append(stored[start - part.first : end - part.first])
        if not found:  # no rows are asked for
            found = [self._parts[0].file.get_slice(self._name)[0:0]]
        return found[0] if len(found) == 1 else torch.cat(found)


def stored(group: str, paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of a group's files, read when they are indexed; Refusal for bad files."""
    parts: dict[str, list[_Part]] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
            rows = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(file.get_slice(name).get_shape())
                first, total = map(int, rows.get(name, (0, shape[0] if shape else 1)))
                parts.setdefault(name, []).append(_Part(first, total, shape, file))
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError):
            raise refuse_file(path) from None
    return {name: StoredTensor(name, group, found) for name, found in parts.items()}


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # isfinite does not know the one-byte floats.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def not_finite(name: str) -> Refusal:
    """Return the refusal of a tensor that is not finite."""
    fix = "resume from a checkpoint before the numbers went wrong"
    return Refusal(f"checkpoint {name}", "NaN or infinity", "finite numbers", fix)


def refuse_file(path: Path) -> Refusal:
    """Return the refusal of a file of a checkpoint."""
    return Refusal("checkpoint", path, "a file as its manifest lists it", _OLDER)


_OLDER = "resume from an older step-N beside it"


def _name_of(dtype: torch.dtype) -> str:
    """Return what safetensors calls a type."""
    name: str = json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]
    return name


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
