"""Checkpoints that outlive a crash at any instant: safetensors, JSON and a manifest; no pickle.

A checkpoint is `folder/step-N`. It is written beside its name, its manifest (SHA-256 and size of
each file) last, and appears by one rename. Nothing older goes before the new one is read back.
Where processes share out the tensors, each writes its own rows; any number of them reads it back.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.train.files import publish, sha256
from gossamer.train.processes import ALONE, Together
from gossamer.train.refusal import Refusal
from gossamer.train.tensor_files import (
    Rows,
    StoredTensor,
    is_finite,
    not_finite,
    refuse_file,
    stored,
    write,
)

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP = re.compile(r"step-(\d+)(\.old)?")
_FILE = re.compile(r"\w[\w.-]*")
_TENSORS = re.compile(r"(\w+?)(-\d{5}-of-\d{5})?\.safetensors")

logger = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor | Rows]],
    state: Mapping[str, Any],
    keep: int,
    together: Together = ALONE,
    fault: Callable[[str], None] = lambda point: None,
) -> Path | None:
    """Write `folder/step-N`, read it back, then prune to the `keep` newest whole checkpoints.

    Each group of `tensors` becomes `<group>.safetensors`, `state` becomes `state.json`. Processes
    that save `together` all call it, in one folder that all see. Each writer gives the same groups,
    with its own tensors and rows, which become `<group>-00002-of-00008.safetensors`.
    Returns None in all of them, with a warning and without a trace on disk, when the disk fails one
    of them (full, read-only).
    Checkpoints past `step` belong to a path the run has left: they are renamed `set-aside-*`.
    Raises Refusal for `keep` < 2 and for NaN or infinity. `fault` is told each point (for tests).
    """
    if keep < 2:
        raise Refusal("keep", keep, "2 or more", "the newest one may be damaged; keep two")
    if bad := next(filter(None, together.gather(_first_not_finite(tensors))), None):
        raise not_finite(bad)
    text = json.dumps(state)
    temporary, final = folder / f".step-{step}.tmp", folder / f"step-{step}"
    try:
        _do(partial(_begin, folder, temporary, text, fault), together, only_first=True)
        parts = _do(partial(_write, temporary, tensors, together, fault), together)
        files = {name: entry for part in parts if part for name, entry in part.items()}
        _do(partial(_finish, temporary, final, step, files, fault), together, only_first=True)
        if bad := problem(final, together=together):
            raise OSError(f"{bad} does not read back as written")
    except OSError as error:
        if together.is_first:
            logger.warning("checkpoint step-%d not saved, the older ones stay: %s", step, error)
            shutil.rmtree(temporary, ignore_errors=True)
            if final.exists() and problem(final):
                shutil.rmtree(final, ignore_errors=True)
        return None
    if together.is_first:
        try:
            _prune(folder, step, keep, fault)
            fault("after-prune")
        except OSError as error:
            logger.warning("checkpoint step-%d is saved, pruning failed: %s", step, error)
    return final


def latest(folder: Path, together: Together = ALONE) -> Path | None:
    """Find the newest whole checkpoint, the same in all processes that look `together`.

    Warns about each damaged one it passes over.
    """
    own = _newest_first(folder) if together.is_first else []
    names = together.gather([path.name for path in own])[0]
    for checkpoint in (folder / name for name in names):
        bad = problem(checkpoint, together=together)
        if bad is None:
            return checkpoint
        if together.is_first:
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
    """Read a checkpoint whole onto the CPU, as the `tensors` and `state` given to `save`.

    Raises Refusal if it is damaged, of a newer format, or holds NaN or infinity.
    """
    if bad := problem(checkpoint):
        raise refuse_file(checkpoint / bad)
    groups, state = read(checkpoint)
    return {g: {n: tensor[...] for n, tensor in flat.items()} for g, flat in groups.items()}, state


def read(checkpoint: Path) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, Any]]:
    """Open a checkpoint that `latest` gave; its tensors are read when they are indexed.

    Raises Refusal for files that are not there or cannot be read, and for a newer format.
    """
    if bad := problem(checkpoint, quick=True):
        raise refuse_file(checkpoint / bad)
    manifest = _manifest(checkpoint)
    if manifest["format"] > FORMAT:
        known = f"a checkpoint format up to {FORMAT}"
        raise Refusal("checkpoint", checkpoint, known, "update gossamer to read it")
    groups: dict[str, list[Path]] = {}
    for name in manifest["files"]:
        if match := _TENSORS.fullmatch(name):
            groups.setdefault(match[1], []).append(checkpoint / name)
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        raise refuse_file(checkpoint / STATE) from None
    return {group: stored(group, paths) for group, paths in groups.items()}, state


def problem(checkpoint: Path, *, quick: bool = False, together: Together = ALONE) -> str | None:
    """Name the first file that is missing or changed; `quick` compares sizes, not hashes.

    The writers of those that look `together` share the files; the answer is the same in all.
    A newer format is not judged: None, and `read` refuses it.
    """
    bad = _own_problem(checkpoint, quick, together) if together.writes else None
    return next(filter(None, together.gather(bad)), None)


def _own_problem(checkpoint: Path, quick: bool, together: Together) -> str | None:
    try:
        manifest = _manifest(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return MANIFEST
    if manifest["format"] > FORMAT:
        return None
    for name in sorted(manifest["files"])[together.rank :: together.writers]:
        path, expected = checkpoint / name, manifest["files"][name]
        try:
            same = path.stat().st_size == expected["size"]
            same = same and (quick or sha256(path) == expected["sha256"])
        except OSError:
            same = False
        if not same:
            return str(name)
    return None


def _do(work: Callable[[], Any], together: Together, *, only_first: bool = False) -> list[Any]:
    """Do work in each process, or the first; OSError in all when the disk failed one of them."""
    result, failed = None, ""
    try:
        if together.is_first or not only_first:
            result = work()
    except OSError as error:
        failed = f"process {together.rank}: {error}" if together.processes > 1 else str(error)
    done = together.gather((result, failed))
    if said := next(filter(None, (failed for _, failed in done)), ""):
        raise OSError(said)
    return [result for result, _ in done]


def _begin(folder: Path, temporary: Path, text: str, fault: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    fault("before-dir")
    temporary.mkdir()
    fault("after-dir")
    (temporary / STATE).write_text(text, encoding="utf-8")
    fault(f"after-file:{STATE}")


def _write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor | Rows]],
    together: Together,
    fault: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Write this process's files and return what the manifest says of them."""
    files = {}
    many = together.writers > 1
    part = f"-{together.rank + 1:05d}-of-{together.writers:05d}" if many else ""
    for group, flat in tensors.items() if together.writes else ():
        name = f"{group}{part}.safetensors"
        files[name] = write(folder / name, flat)
        fault(f"after-file:{name}")
    return files


def _finish(
    temporary: Path,
    final: Path,
    step: int,
    files: dict[str, dict[str, Any]],
    fault: Callable[[str], None],
) -> None:
    """Write the manifest of a checkpoint whose other files are there, and publish it."""
    fault("before-manifest")
    path = temporary / STATE
    files = {**files, STATE: {"sha256": sha256(path), "size": path.stat().st_size}}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (temporary / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")
    fault("before-rename")
    _move_in(temporary, final)
    fault("after-rename")


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


def _first_not_finite(tensors: Mapping[str, Mapping[str, Tensor | Rows]]) -> str:
    for group, flat in tensors.items():
        for name, tensor in flat.items():
            if not is_finite(tensor.tensor if isinstance(tensor, Rows) else tensor):
                return f"{group}/{name}"
    return ""
