"""Checkpoints that outlive a crash at any instant: safetensors, JSON and a manifest; no pickle.

A checkpoint is `folder/step-N`. It is written beside its name, its manifest (SHA-256 and size of
each file) last, and appears by one rename. Nothing older goes before the new one is read back.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.train.files import publish, sha256
from gossamer.train.refusal import Refusal
from gossamer.train.sharded import shared_like

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LOCK = "run.lock"
_WAYS = ("foreach", "fused")
_STEP = re.compile(r"step-(\d+)(\.old)?")
_FILE = re.compile(r"\w[\w.-]*")

NamedParams = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

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


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: NamedParams
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten an AdamW-like optimizer: tensors called `<parameter>/<field>`, the rest as JSON."""
    names = {param: name for name, param in dict(named_params).items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        owned = [names[param] for param in group["params"]]
        settings = {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        groups.append({"params": owned, "settings": settings})
        for name, param in zip(owned, group["params"], strict=True):
            for field, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{field}"] = value
                else:
                    scalars.setdefault(name, {})[field] = value
    kind = type(optimizer).__name__
    return tensors, {"kind": kind, "groups": groups, "scalars": scalars}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    named_params: NamedParams,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Restore bit for bit what `optimizer_tensors` gave; Refusal if parameters or optimizer differ.

    Unlike Optimizer.load_state_dict it keeps each tensor's dtype. How the update is computed, fused
    or not, is this machine's matter and stays as it is.
    """
    kind, saved_kind = type(optimizer).__name__, state.get("kind", "AdamW")
    if kind != saved_kind:
        raise Refusal("optimizer", kind, f"{saved_kind}, of the checkpoint", "set the same one")
    params = dict(named_params)
    names = {param: name for name, param in params.items()}
    groups = optimizer.param_groups
    current = {(i, names[p]) for i, group in enumerate(groups) for p in group["params"]}
    saved = {(i, name) for i, group in enumerate(state["groups"]) for name in group["params"]}
    if current != saved:
        differing = ", ".join(name for _, name in sorted(current ^ saved)[:5])
        allowed = "the parameters and groups the checkpoint was trained with"
        raise Refusal("optimizer", differing, allowed, "resume with the run's own configuration")
    on_device = set()
    for group, stored in zip(groups, state["groups"], strict=True):
        for key, value in stored["settings"].items():
            if key in _WAYS:
                continue
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        if group.get("capturable") or group.get("fused"):
            on_device.update(stored["params"])
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        # torch counts steps on the host unless the update itself runs without it.
        on_host = field == "step" and name not in on_device
        own = tensor.clone() if on_host else shared_like(tensor, params[name])
        optimizer.state[params[name]][field] = own
    for name, fields in state["scalars"].items():
        optimizer.state[params[name]].update(fields)


class RunLock:
    """Hold a folder for one process; Refusal, of the key `field`, while another process holds it.

    A process that died on this host frees the lock; one of another host cannot be asked.
    """

    def __init__(self, folder: Path, field: str = "run_dir") -> None:
        self._path, self._field = folder / LOCK, field
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            fix = f"choose another folder: {error}"
            raise Refusal(self._field, self._path.parent, "a folder to write into", fix) from error
        try:
            self._take(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()

    def _take(self, file: TextIO) -> None:
        file.seek(0)
        words = file.read().split()
        pid, host, started = words if len(words) == 3 else ("", "", "")
        try:
            # The kernel drops this lock at death, and forked data workers do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except (BlockingIOError, PermissionError):
            held = True
        except OSError as error:
            logger.warning("%s cannot be locked (%s), trusting what it says", self._path, error)
            held = False
        here = socket.gethostname()
        if held or (pid and (host != here or _started(pid) == started)):
            fix = f"stop process {pid} on {host}; if it is gone, delete {self._path.name} there"
            raise Refusal(self._field, self._path.parent, "a folder no other run writes", fix)
        if pid:
            logger.warning("taking over %s from process %s, which died", self._path, pid)
        file.truncate(0)
        file.write(f"{os.getpid()} {here} {_started(str(os.getpid())) or '-'}")
        file.flush()


def _started(pid: str) -> str:
    """Tell when a living process started, in ticks since boot; its pid alone may be reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


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
