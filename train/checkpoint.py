"""Checkpoints that outlive a crash at any instant: safetensors, JSON and a manifest; no pickle.

A checkpoint is `folder/step-N`. It is written beside its name, its manifest (SHA-256 and size of
each file) last, and appears by one rename. Nothing older goes before the new one is read back.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.train.files import publish, sha256
from gossamer.train.refusal import Refusal

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP = re.compile(r"step-(\d+)(\.old)?")
_FILE = re.compile(r"\w[\w.-]*")

logger = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    fault: Callable[[str], None] = lambda point: None,
) -> Path | None:
    """Write `folder/step-N`, read it back, then prune to the `keep` newest whole checkpoints.

    Each group of `tensors` becomes `<group>.safetensors`, `state` becomes `state.json`.
    Returns None, with a warning and without a trace on disk, when the disk fails (full, read-only).
    Checkpoints past `step` belong to a path the run has left: they are renamed `set-aside-*`.
    Raises Refusal for `keep` < 2 and for NaN or infinity. `fault` is told each point (for tests).
    """
    if keep < 2:
        raise Refusal("keep", keep, "2 or more", "the newest one may be damaged; keep two")
    _check_finite(tensors)
    text = json.dumps(state)
    temporary, final = folder / f".step-{step}.tmp", folder / f"step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        fault("before-dir")
        temporary.mkdir()
        fault("after-dir")
        _write(temporary, step, tensors, text, fault)
        fault("before-rename")
        _move_in(temporary, final)
        fault("after-rename")
        if bad := problem(final):
            raise OSError(f"{bad} does not read back as written")
    except (OSError, SafetensorError) as error:
        logger.warning("checkpoint step-%d not saved, the older ones stay: %s", step, error)
        shutil.rmtree(temporary, ignore_errors=True)
        if final.exists() and problem(final):
            shutil.rmtree(final, ignore_errors=True)
        return None
    try:
        _prune(folder, step, keep, fault)
        fault("after-prune")
    except OSError as error:
        logger.warning("checkpoint step-%d is saved, pruning failed: %s", step, error)
    return final


def latest(folder: Path) -> Path | None:
    """Find the newest whole checkpoint; warn about each damaged one it passes over."""
    for checkpoint in _newest_first(folder):
        bad = problem(checkpoint)
        if bad is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s), taking the one before", checkpoint, bad)
    return None


def clean(folder: Path) -> None:
    """Remove what an interrupted save or prune left; a disk that refuses is warned about."""
    try:
        _clean(folder)
    except OSError as error:
        logger.warning("leftovers in %s stay: %s", folder, error)


def step_of(checkpoint: Path) -> int:
    """Return the N of a folder step-N."""
    return int(checkpoint.name.removesuffix(".old").removeprefix("step-"))


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint onto the CPU, as the `tensors` and `state` given to `save`.

    Raises Refusal if it is damaged, of a newer format, or holds NaN or infinity.
    """
    bad = problem(checkpoint)
    if bad is not None:
        raise _refuse_file(checkpoint / bad)
    manifest = _manifest(checkpoint)
    if manifest["format"] > FORMAT:
        known = f"a checkpoint format up to {FORMAT}"
        raise Refusal("checkpoint", checkpoint, known, "update gossamer to read it")
    tensors = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                tensors[name.removesuffix(".safetensors")] = load_file(checkpoint / name)
            except SafetensorError:
                raise _refuse_file(checkpoint / name) from None
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        raise _refuse_file(checkpoint / STATE) from None
    _check_finite(tensors)
    return tensors, state


def problem(checkpoint: Path, *, quick: bool = False) -> str | None:
    """Name the first file that is missing or changed; `quick` compares sizes, not hashes.

    A newer format is not judged: None, and `load` refuses it.
    """
    try:
        manifest = _manifest(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return MANIFEST
    if manifest["format"] > FORMAT:
        return None
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        try:
            same = path.stat().st_size == expected["size"]
            same = same and (quick or sha256(path) == expected["sha256"])
        except OSError:
            same = False
        if not same:
            return str(name)
    return None


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    text: str,
    fault: Callable[[str], None],
) -> None:
    (folder / STATE).write_text(text, encoding="utf-8")
    fault(f"after-file:{STATE}")
    for group, flat in tensors.items():
        path = folder / f"{group}.safetensors"
        save_file(_unshared(flat), path)
        # safetensors makes its files private to the user; follow the umask as the others do.
        shutil.copymode(folder / STATE, path)
        fault(f"after-file:{path.name}")
    fault("before-manifest")
    files = {
        path.name: {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")


def _unshared(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU and copy those that share memory, which safetensors refuses."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in flat.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return plain


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, sort_keys=True, indent=1)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest; any change to it raises one of the errors that `problem` knows."""
    text = (checkpoint / MANIFEST).read_text("utf-8")
    manifest: dict[str, Any] = json.loads(text)
    del manifest["digest"]
    named = _STEP.fullmatch(checkpoint.name)
    if text != _manifest_text(manifest) or (named and int(named[1]) != manifest["step"]):
        raise ValueError("the manifest was changed")
    if not all(_FILE.fullmatch(name) for name in manifest["files"]):
        raise ValueError("the manifest names a file outside its folder")
    return manifest


def _newest_first(folder: Path) -> list[Path]:
    """List the checkpoint folders by step; one moved aside (`.old`) follows its replacement."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and (match := _STEP.fullmatch(path.name)):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _clean(folder: Path) -> None:
    hidden = [path for path in folder.glob(".step-*") if path.is_dir()]
    unfinished = [path for path in _newest_first(folder) if not (path / MANIFEST).exists()]
    for path in [*hidden, *unfinished]:
        shutil.rmtree(path)


def _move_in(temporary: Path, final: Path) -> None:
    """Publish a checkpoint; a whole one of the same step stays, moved aside, until the prune."""
    if final.exists() and problem(final) is None:
        aside = final.with_name(f"{final.name}.old")
        if aside.exists():
            shutil.rmtree(aside)
        final.replace(aside)
    elif final.exists():
        shutil.rmtree(final)
    publish(temporary, final)


def _prune(folder: Path, step: int, keep: int, fault: Callable[[str], None]) -> None:
    kept: dict[int, Path] = {}
    for path in _newest_first(folder):
        if step_of(path) > step:
            aside = folder / f"set-aside-{path.name}"
            logger.warning("%s lies past step %d: renamed to %s", path, step, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
        elif len(kept) < keep and step_of(path) not in kept and problem(path, quick=True) is None:
            kept[step_of(path)] = path
        else:
            # Hidden first: half a deletion must not look like a checkpoint.
            doomed = folder / f".{path.name}"
            path.replace(doomed)
            fault("during-prune")
            shutil.rmtree(doomed)


def _check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for group, flat in tensors.items():
        for name, tensor in flat.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            # isfinite does not know the one-byte floats.
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not wide.isfinite().all():
                fix = "resume from a checkpoint before the numbers went wrong"
                raise Refusal(
                    f"checkpoint {group}/{name}", "NaN or infinity", "finite numbers", fix
                )


def _refuse_file(path: Path) -> Refusal:
    allowed = "a file as its manifest lists it"
    return Refusal("checkpoint", path, allowed, "resume from an older step-N beside it")
