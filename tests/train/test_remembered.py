"""Teacher velocities that the jobs of a sweep leave each other: the same numbers, one forward."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.train import shared_file
from gossamer.train.data.shards import Manifest
from gossamer.train.draws import Noised
from gossamer.train.job import VELOCITIES
from gossamer.train.remembered import Remembered
from gossamer.train.stages import train_stage
from gossamer.train.teach import write_cache
from gossamer.train.teacher import Cached, Frozen
from gossamer.train.velocities import cache_dir


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Count the velocities that a frozen teacher is asked for."""
    own, found = Frozen.velocity, []

    def velocity(self: Frozen, student: torch.nn.Module, noised: Noised) -> Tensor:
        found.append(own(self, student, noised))
        return found[-1]

    monkeypatch.setattr(Frozen, "velocity", velocity)
    return found


def losses(make_job: Any, lab: Any, folder: Path | None, name: str, **settings: Any) -> list[Any]:
    job = make_job(name=name, steps=3, **settings)
    job.kept = {VELOCITIES: folder}
    train_stage(job)
    return lab.run(job.run_dir.parent, job.run_dir.name).losses


def test_a_second_job_with_the_same_samples_asks_no_teacher_and_learns_the_same(
    asked: list[Tensor], make_job: Any, lab: Any, tmp_path: Path
) -> None:
    alone = losses(make_job, lab, None, "alone")
    assert len(asked) == 3
    first = losses(make_job, lab, tmp_path, "first")
    assert len(asked) == 6 and first == alone
    assert losses(make_job, lab, tmp_path, "second") == alone
    other_mask = losses(make_job, lab, tmp_path, "sparse", sparsity=0.6, compensation="drop")
    assert len(asked) == 6 and other_mask != alone


@pytest.mark.parametrize(
    "settings",
    [
        {"repeat_seeds": [1]},
        {"noise": "log_normal"},
        {"training_data__clips": 5},
        {"noise_draws": 2},
        {"guidance__scale": 3.0},
    ],
)
def test_other_samples_or_another_target_ask_anew(
    settings: dict[str, Any], asked: list[Tensor], make_job: Any, lab: Any, tmp_path: Path
) -> None:
    losses(make_job, lab, tmp_path, "first")
    losses(make_job, lab, tmp_path, "other", **settings)
    assert len(asked) == 6


def test_data_encoded_anew_in_the_same_folder_asks_anew(
    asked: list[Tensor],
    make_job: Any,
    lab: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses(make_job, lab, tmp_path, "first")
    load = Manifest.load

    def of_another_film(folder: Path) -> Manifest | None:
        found = load(folder)
        assert found is not None
        return replace(found, request={**found.request, "sources": ["another"]})

    monkeypatch.setattr(Manifest, "load", of_another_film)
    losses(make_job, lab, tmp_path, "other")
    assert len(asked) == 6


def test_a_full_disk_ends_the_keeping_and_not_the_training(
    asked: list[Tensor],
    make_job: Any,
    lab: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = losses(make_job, lab, None, "alone")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_file, "write_atomic", full)
    with caplog.at_level(logging.WARNING):
        assert losses(make_job, lab, tmp_path, "full") == alone
    assert len(asked) == 6
    said = [r.message for r in caplog.records if "is not left to other jobs" in r.message]
    assert len(said) == 1 and "No space left" in said[0]


def test_a_disk_with_little_room_is_left_to_the_checkpoints(
    asked: list[Tensor],
    make_job: Any,
    lab: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    few = usage._replace(total=1000 * 2**20, free=50 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: few)
    losses(make_job, lab, tmp_path, "first")
    assert not list(tmp_path.glob("*/*.safetensors")) and len(asked) == 3


def test_a_velocity_that_cannot_be_read_is_asked_for_again(
    asked: list[Tensor], make_job: Any, lab: Any, tmp_path: Path
) -> None:
    first = losses(make_job, lab, tmp_path, "first")
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    assert losses(make_job, lab, tmp_path, "second") == first and len(asked) == 6
    assert losses(make_job, lab, tmp_path, "third") == first and len(asked) == 6


def test_a_velocity_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    class Failing:
        def velocity(self, student: Any, noised: Any) -> Tensor:
            return torch.full((1, 2), torch.nan)

    teacher = Remembered(Failing(), tmp_path)  # type: ignore[arg-type]
    noised: Any = SimpleNamespace(index=[0], seeds=[0], x=torch.zeros(1))
    assert teacher.velocity(None, noised).isnan().all()  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir()) and not teacher.is_full


def test_cached_velocities_are_kept_once(make_job: Any, tmp_path: Path) -> None:
    job = make_job(teacher="cached", noise_draws=1)
    job.kept = {VELOCITIES: tmp_path}
    write_cache(job, cache_dir(job.cfg))
    assert isinstance(job.teacher(), Cached)
    job.kept = {VELOCITIES: None}
    assert not isinstance(make_job().teacher(), Remembered)
