"""Calibration: budgets that meet the sparsity, from errors that a head's sparsity really causes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.sparse.attach import attentions, method_from_spec
from gossamer.train.calibrate import calibrate
from gossamer.train.calibration import CALIBRATION, Calibration, weights_digest
from gossamer.train.evaluate import measure_masks, noisy_samples, velocities
from gossamer.train.job import run
from gossamer.train.refusal import Refusal

LEVELS = [0.7, 0.3]
BLOCKS = 32  # a row of the tiny teacher


def samples_of(job: Any) -> list[Any]:
    dataset = job.dataset("train")
    return noisy_samples([dataset[2], dataset[7]], LEVELS, 2, job.device)


def calibrated_at(job: Any, sparsity: float, probes: int = 2) -> Calibration:
    return calibrate(
        job.dense(),
        method_from_spec(job.method_spec),
        samples_of(job),
        sparsity=sparsity,
        noise_levels=LEVELS,
        densities=[0.1, 0.25, 0.5, 0.75],
        probes=probes,
        seed=0,
        clips=2,
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.9, 1 - 1 / BLOCKS])
def test_the_planned_density_is_the_target_within_one_block(make_job: Any, sparsity: float) -> None:
    job = make_job()
    result = calibrated_at(job, sparsity)
    assert result.target_density == pytest.approx(1 - sparsity)
    assert abs(result.planned_density - (1 - sparsity)) <= 1 / BLOCKS
    student = job.student(0).requires_grad_(False).eval()
    result.apply(student)
    # the masks of a student deviate from the plan only as far as earlier layers change q and k
    assert abs(measure_masks(student, samples_of(job)).mean_density - (1 - sparsity)) < 2 / BLOCKS
    assert min(mass for layer in result.captured_mass for head in layer for mass in head) > 0


def test_calibrating_twice_gives_the_same_budgets(make_job: Any) -> None:
    first, second = (calibrated_at(make_job(), 0.6) for _ in range(2))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)


def test_the_error_of_a_head_is_that_of_the_model_with_only_this_head_sparse(make_job: Any) -> None:
    job = make_job()
    result, samples = calibrated_at(job, 0.6, probes=64), samples_of(job)
    target = velocities(job.dense(), samples, "teacher")
    student = job.student(0).requires_grad_(False).eval()
    policies = [attention.policy for attention in attentions(student).values()]
    for layer, policy in enumerate(policies):
        for head in range(result.num_heads):
            for point in (1, 2):  # densities 0.25 and 0.5
                for other in policies:
                    other.set_budget(torch.ones(result.num_heads), torch.zeros(result.num_heads))
                policy.k[head] = result.curve_densities[point]
                found = velocities(student, samples, "")
                true = [
                    (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
                    for mine, theirs in zip(found, target, strict=True)
                ]
                error = result.curve_error[layer][head][point]
                assert error == pytest.approx(float(torch.cat(true).square().mean()), rel=0.3)


def test_budgets_are_saved_loaded_and_set(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    result = calibrated_at(job, 0.75)
    result.save(tmp_path / "kept")
    loaded = Calibration.load(tmp_path / "kept")
    assert loaded == result
    student = job.student(0)
    loaded.apply(student)
    for attention, k, p in zip(attentions(student).values(), result.k, result.p, strict=True):
        assert torch.equal(attention.policy.k, torch.tensor(k))
        assert torch.equal(attention.policy.p, torch.tensor(p))


def test_more_sparsity_than_blocks_allow_is_refused(make_job: Any) -> None:
    with pytest.raises(ValueError, match="one must stay"):
        calibrated_at(make_job(), 0.99)


def test_a_calibration_of_other_masks_or_another_model_is_refused(
    make_job: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    for settings, said in (
        ({"sparsity": 0.5}, "sparsity: 0.6, now 0.5"),
        ({"layout__block": [2, 2, 2]}, "layout: "),
        ({"estimator": "oracle"}, "estimator: "),
    ):
        with pytest.raises(Refusal, match=said):
            make_job(**settings).student(0)
    make_job(compensation="drop").student(0)  # which computes other blocks' share, not other masks
    for name, change, said in (
        ("other", {"seed": 5}, "weights: "),
        ("deeper", {"model.num_layers": 3}, "the model's 3 layers of 2 heads"),
        ("wider", {"model.num_heads": 1, "model.head_dim": 32}, "the model's 2 layers of 1 heads"),
    ):
        settings = {**lab.teacher_settings, **change, "name": name, "steps": 1}
        assert launcher.run(lab.overrides(tmp_path, settings)).code == 0
        with pytest.raises(Refusal, match=said):
            make_job(model__path=tmp_path / name / "export").student(0)


def test_a_forced_change_of_sparsity_calibrates_again_and_takes_the_new_masks(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    assert launcher.run(lab.student(tmp_path)).code == 0
    changed = lab.student(tmp_path, sparsity=0.8, steps=12, resume="force")
    done = launcher.run(changed)
    assert done.code == 0 and "calibrating again: sparsity: 0.6, now 0.8" in done.text
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").open()]
    assert len(rows) == 12
    assert all(abs(row["density"] - (0.4 if row["step"] <= 8 else 0.2)) < 0.06 for row in rows)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": []}'])
def test_a_damaged_calibration_is_refused(text: str, make_job: Any, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(Refusal, match="a calibration of this version"):
        make_job(calibration__path=tmp_path).student(0)


def test_a_missing_calibration_is_never_made_where_an_earlier_one_was_named(
    make_job: Any, tmp_path: Path
) -> None:
    job = make_job(calibration__path=tmp_path / "none")
    with pytest.raises(Refusal, match=r"calibration\.path"):
        run(job.cfg, ["calibrate"])
    assert not (tmp_path / "none").exists()


def test_weights_are_told_apart(make_job: Any) -> None:
    first, second = make_job().dense(), make_job().student(0)
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.get_parameter("proj_out.bias")[0] += 1e-6
    assert weights_digest(first) != weights_digest(second)
