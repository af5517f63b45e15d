"""Weights of diffusers and transformers models: looked at without reading, then loaded whole."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.train.refusal import Refusal

SUFFIX = ".safetensors"
PIECES, PIECE = 64, 2**16  # bytes


def check_weights(folder: Path, field: str) -> None:
    """Refuse a folder whose safetensors files or their indices are missing or cut.

    Reads headers and indices only.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob(f"*{SUFFIX}"))
    listed: set[str] = set()
    for index in folder.glob(f"*{SUFFIX}.index.json"):
        try:
            listed |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            allowed = f"an index of {SUFFIX} files in JSON ({error!r})"
            raise Refusal(field, index, allowed, "copy it again") from error
    missing = sorted(listed - {file.name for file in files})
    if not files or missing:
        what = f"{', '.join(missing[:3])} missing" if missing else "there is none"
        raise Refusal(
            field,
            folder,
            f"a folder with its *{SUFFIX} weights ({what})",
            "download the whole folder again (hf download REPOSITORY --local-dir DIR)",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise Refusal(
                field, file, f"a whole {SUFFIX} file ({error})", "copy it again"
            ) from error


def load_whole(
    cls: Any, folder: Path, field: str, *, exact: bool = False, **options: Any
) -> nn.Module:
    """Load a model in eval mode; refuse weights that are missing, misshapen or not finite.

    `exact` also refuses weights that the model has no place for; `options` go to from_pretrained.
    """
    from safetensors import SafetensorError

    check_weights(folder, field)
    try:
        model, info = cls.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        allowed = f"a folder with a whole {cls.__name__}"
        raise Refusal(field, folder, allowed, f"check its files: {error}") from error
    odd = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    odd += info["unexpected_keys"] if exact else []
    odd = odd or [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if odd:
        raise Refusal(
            field,
            folder,
            f"finite weights for the tensors of {cls.__name__}, none missing and none over "
            f"({len(odd)} differ: {', '.join(sorted(odd)[:5])})",
            "take the weights that belong to its config.json",
        )
    return model.eval()


def stamp(folder: Path) -> str:
    """Return a short SHA-256 of a folder's weights by names, sizes and PIECES of each file.

    A training changes it, a copy does not; it reads 4 MB a file.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                whole.update(file.read(PIECE))
    return whole.hexdigest()[:16]


def digest(model: nn.Module) -> str:
    """Return a short SHA-256 of a model's parameters, gossamer's attention left out."""

    def one(name: str, parameter: Tensor) -> bytes:
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest = hashlib.sha256(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(content.numpy())  # type: ignore[arg-type]
        return digest.digest()

    named = [(n, p) for n, p in sorted(model.named_parameters()) if ".processor." not in n]
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        parts = pool.map(lambda pair: one(*pair), named)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
