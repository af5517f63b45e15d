"""Triton's interpreter where there is no GPU, the lab of the trainer's tests, poisoned tensors.

Films, data and models are made once for all workers of pytest-xdist: no test may write into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Runs of one and of several processes are compared. On some processors MKL's own kernels round a
# product of two clips otherwise than that of four, and AdamW's first steps make 2e-5 of that.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import pytest
from lab import TEACHER, Lab, Launcher, Run, write_film

if TYPE_CHECKING:
    from gossamer.train.job import Job


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """A command run in this process sets up logging; take that back."""
    logger = logging.getLogger("gossamer")
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    logger.level, logger.handlers, logger.propagate = before


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Look for triton.language's builtins once: the interpreter does so at each device function."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: object, builder: object, scope: object) -> None:
        for name in builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and torch.empty_like return with NaN, so unwritten outputs show."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):  # type: ignore[no-untyped-def]
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function: a name and what fills a folder -> the folder, filled by the first that asks."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # of all workers

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        folder, marker = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not marker.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                marker.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def lab(made_once: Callable[..., Path], launcher: Launcher) -> Lab:
    def fill(root: Path) -> None:
        lab = Lab(root)
        write_film(lab.film)
        lab.film.with_suffix(".txt").write_text("a square over a shaded ground")
        runs = lab.root / "runs"
        calibrate = {**lab.student_settings, "name": "calibrated", "stages": ["calibrate"]}
        for settings in (TEACHER, calibrate):
            done = launcher.run(lab.overrides(runs, settings))
            assert done.code == 0, done.text

    return Lab(made_once("lab", fill))


@pytest.fixture(scope="module")
def unbroken(
    request: pytest.FixtureRequest, made_once: Callable[..., Path], lab: Lab, launcher: Launcher
) -> Run:
    """The run in one process, of the module's SETTINGS if it has any, that nothing disturbs."""
    settings = getattr(request.module, "SETTINGS", {})

    def fill(runs: Path) -> None:
        done = launcher.run(lab.student(runs, **settings))
        assert done.code == 0, done.text

    name = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
    return lab.run(made_once(f"unbroken-{name}", fill))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the jobs of the launcher do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_job(lab: Lab, tmp_path: Path, one_thread: None) -> Callable[..., Job]:
    """Return a function: settings of a student -> its Job in this process, masks calibrated."""
    from gossamer.train.config import compose
    from gossamer.train.job import Job, make_accelerator

    def make(**settings: object) -> Job:
        cfg = compose(lab.student(tmp_path, **settings))
        return Job(cfg, make_accelerator(cfg), list(cfg.stages))

    return make
