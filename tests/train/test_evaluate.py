"""Evaluation: errors, masks and samples measured against independent formulas."""

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.sparse.attach import attentions
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.train import heldout
from gossamer.train.evaluate import measure_masks, other_backends, relative_errors, velocities
from gossamer.train.evaluation import evaluate_stage
from gossamer.train.measures import Sample
from gossamer.train.run import run
from gossamer.train.samples import decode, evenly, judge, keep_videos, noisy_samples, sample_latents
from gossamer.train.stages import train_stage

LEVELS = [0.7, 0.3]
LABELS = ("q_labels", "k_labels")


def samples_of(job: Any, clips: int = 3, batch_size: int = 2) -> list[Sample]:
    dataset = job.dataset("heldout")
    return noisy_samples([dataset[i] for i in range(clips)], LEVELS, batch_size, job.device)


def test_errors_are_relative_norms_by_clip_and_level() -> None:
    chance = np.random.default_rng(0)
    teacher, student = chance.normal(size=(2, 2, 5, 3, 2, 4, 4)).astype(np.float32)  # [level, clip]
    batches, mine, theirs = [], [], []
    for level in range(2):
        for start in (0, 2, 4):
            part = slice(start, min(start + 2, 5))
            x = torch.zeros(0)
            batches.append(Sample(level, x, x, x, None))
            mine.append(torch.from_numpy(student[level, part]))
            theirs.append(torch.from_numpy(teacher[level, part]))
    found = relative_errors(mine, theirs, batches, 2)
    for clip in range(5):
        for level in range(2):
            difference = (student[level, clip] - teacher[level, clip]).ravel().astype(np.float64)
            norm = math.sqrt((teacher[level, clip].ravel().astype(np.float64) ** 2).sum())
            expected = math.sqrt((difference**2).sum()) / norm
            assert found[clip][level] == pytest.approx(expected, rel=1e-5)


def test_sparsity_zero_has_no_velocity_error(make_job: Any) -> None:
    job = make_job(sparsity=0.0)
    samples = samples_of(job)
    teacher = velocities(job.dense(), samples, "teacher")
    student = velocities(job.student(0).requires_grad_(False).eval(), samples, "student")
    assert relative_errors(student, teacher, samples, 2) == [[0.0, 0.0]] * 3


def test_masks_that_keep_everything_have_no_velocity_error_but_rounding(make_job: Any) -> None:
    job = make_job()
    samples, student = samples_of(job), job.student(0).requires_grad_(False).eval()
    target = velocities(job.dense(), samples, "teacher")
    sparse = np.array(relative_errors(velocities(student, samples, ""), target, samples, 2))
    for attention in attentions(student).values():
        attention.policy.k.fill_(1)
    full = np.array(relative_errors(velocities(student, samples, ""), target, samples, 2))
    assert full.max() < 1e-5 < 1e-3 < sparse.min()


def test_density_and_recall_equal_a_count_over_tokens(make_job: Any, lab: Any) -> None:
    q_size, kv_size = 20, 12  # neither divides the 128 tokens
    sizes = {"layout": "row_major", "layout__q_block": q_size, "layout__kv_block": kv_size}
    job = make_job(**sizes, layout__block=None, calibration__path=None)
    run(job.cfg, ["calibrate"])
    student, seen = job.student(0).requires_grad_(False).eval(), {}
    samples = samples_of(job, clips=2)
    report = measure_masks(student, samples)
    for name, attention in attentions(student).items():
        attention.register_forward_hook(
            lambda module, args, out, name=name: seen.setdefault(name, []).append(
                (args[0], args[1], module.mask.selected)
            )
        )
    velocities(student, samples, "")
    for name, calls in seen.items():
        shares, masses = [], []
        for q, k, selected in calls:
            tokens = torch.arange(q.shape[2])
            kept = selected[:, :, tokens // q_size][:, :, :, tokens // kv_size]  # [B, H, S, S]
            mass = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).double().softmax(-1)
            shares.append(kept.double().mean((2, 3)))
            masses.append((mass * kept).sum(3).mean(2))
        expected = torch.cat(shares).mean(0)
        assert report.density[name].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
        expected = torch.cat(masses).mean(0)
        assert report.recall[name].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    densities = torch.stack(list(report.density.values()))
    assert report.mean_density == pytest.approx(float(densities.mean()))


def test_samples_are_compared_with_the_teacher_by_their_pixels(
    make_job: Any, tmp_path: Path
) -> None:
    job = make_job()
    dataset = job.dataset("heldout")
    models = {"teacher": job.dense(), "before": job.student(0).requires_grad_(False).eval()}
    options = {"batch_size": 1, "steps": 2, "shift": 1.0, "device": job.device}
    clips = [dataset[0], dataset[5]]
    latents = {n: sample_latents(m, clips, name=n, **options) for n, m in models.items()}
    latents["real"] = torch.stack([clip["latent"] for clip in clips])
    videos = decode(latents, job.codec, job.device)
    found = judge(videos, [])
    assert keep_videos(videos, tmp_path, 1) == [tmp_path / "clip-0.npz"]
    assert [f.name for f in keep_videos(videos, tmp_path, None)] == ["clip-0.npz", "clip-1.npz"]
    assert found.keys() == {"real/teacher", "real/before", "teacher/before"}
    for index in range(2):
        frames = dict(np.load(tmp_path / f"clip-{index}.npz"))
        assert frames["teacher"].shape == (8, 32, 64, 3)
        for name, other in (("teacher/before", "teacher"), ("real/before", "real")):
            error = frames["before"].astype(float) - frames[other].astype(float)
            expected = 20 * math.log10(255 / math.sqrt((error**2).mean()))
            assert found[name]["psnr"][index] == pytest.approx(expected)
    again = sample_latents(models["teacher"], clips[1:], name="teacher", **options)
    torch.testing.assert_close(again[0], latents["teacher"][1], rtol=1e-3, atol=1e-3)
    other = sample_latents(
        models["teacher"], clips, name="other_noise", other_noise=True, **options
    )
    assert float((other - latents["teacher"]).abs().mean()) > 0.01


def test_another_backend_of_the_dense_model_changes_only_rounding(make_job: Any) -> None:
    job = make_job()
    teacher, samples = job.dense(), samples_of(job)
    target = velocities(teacher, samples, "")
    found = other_backends(teacher, samples)
    assert "math" in found and "cudnn" not in found
    for name, v in found.items():
        assert np.max(relative_errors(v, target, samples, 2)) < 1e-5, name


def test_a_sparse_run_reports_its_errors_and_its_sparsity(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    stages = ["calibrate", "train", "evaluate"]
    overrides = lab.student(
        tmp_path, stages=stages, repeat_seeds=[3], evaluation__clips=4, calibration__path=None
    )
    file, found = tmp_path / "student" / "evaluation" / "evaluation.json", []
    for _ in range(2):
        file.unlink(missing_ok=True)
        assert launcher.run(overrides).code == 0
        found.append(json.loads(file.read_text()))
        assert found[-1].pop("seconds") > 0 and min(found[-1].pop("forward_seconds").values()) > 0
    assert found[0] == found[1]
    result = found[0]
    done = launcher.run(overrides)
    assert "is already of these checkpoints: nothing to do" in done.text
    assert result["trained"]
    real = np.array(result["heldout_loss"]["teacher"])
    assert real.shape == (4, 2) and (np.array(result["heldout_loss"]["after"]) > 0).all()
    changes = ("compensation=drop", "noise=shifted", "evaluation.clips=3", "sparsity=0.7")
    for change in (*changes, "compile=true"):
        done = launcher.run([*overrides, change, "resume=force"])
        assert done.code == 0 and "nothing to do" not in done.text, change
    assert result["seeds"] == [0, 3] and result["noise_levels"] == LEVELS
    assert len({clip["clip_id"] for clip in result["clips"]}) == 4
    errors = [result["velocity_error"]["before"], *result["velocity_error"]["after"].values()]
    assert np.array(errors).shape == (3, 4, 2) and np.array(errors).min() > 0
    sparsity = result["sparsity"]
    assert sparsity["requested"] == 0.6 and abs(sparsity["planned"] - 0.6) <= 1 / 32
    for when in ("before", "after"):
        densities = np.array(result["density"][when])  # [layer, head]
        assert sparsity[f"measured_{when}"] == pytest.approx(1 - densities.mean())
        assert abs(sparsity[f"measured_{when}"] - 0.6) < 0.1
        assert (np.array(result["recall"][when]) < 1).all()


def test_the_hit_rate_of_codebooks_is_counted_along_the_samples(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers take turns; only a sampler's second and third step go on from the step before."""
    job = make_job(
        layout="semantic_clusters",
        layout__block=None,
        layout__num_q=8,
        layout__num_kv=16,
        estimator="error_aware",
        policy="error_budget",
        policy__unit="tokens",
        calibration__path=None,
        evaluation__sample_steps=3,
        stages=["calibrate", "evaluate"],
    )
    stayed = []
    cluster = SemanticClusters.cluster

    def counted(*arguments: Any) -> Any:
        found, before = cluster(*arguments), arguments[-1]
        if before is not None:
            pairs = (getattr(found.codebook, n) == getattr(before, n) for n in LABELS)
            stayed.append([pair.double().mean((0, 2)).tolist() for pair in pairs])
        return found

    monkeypatch.setattr(SemanticClusters, "cluster", counted)
    run(job.cfg, ["calibrate", "evaluate"])
    result = json.loads((job.run_dir / "evaluation" / "evaluation.json").read_text())
    assert np.array(stayed).shape == (4, 2, 2)  # steps x layers, sides, heads
    expected = np.array(stayed).reshape(2, 2, 2, 2).mean(0)
    assert 0 < expected.min() < 1
    for when in ("before", "after"):
        np.testing.assert_allclose(result["hit_rate"][when], expected, rtol=1e-6)


def test_a_dense_run_reports_the_flow_matching_loss(
    lab: Any, launcher: Any, make_job: Any, tmp_path: Path
) -> None:
    settings = {"loss": "flow_matching", "sparsity": 0.0, "stages": ["train", "evaluate"]}
    settings |= {"evaluation__clips": 3, "evaluation__batch_size": 2, "steps": 2}
    assert launcher.run(lab.student(tmp_path, **settings)).code == 0
    file = tmp_path / "student" / "evaluation" / "evaluation.json"
    result = json.loads(file.read_text())
    job = make_job(**settings)
    dataset, model = job.dataset("heldout"), job.trained(0)
    chosen = [dataset[clip["index"]] for clip in result["clips"]]
    for level, t in enumerate(LEVELS):
        losses = []
        for clip in chosen:
            sample = noisy_samples([clip], LEVELS, 1, job.device)[level]
            velocity = velocities(model, [sample], "")[0][0]
            noise = (sample.x[0] - (1 - t) * clip["latent"]) / t
            losses.append(float((velocity - (noise - clip["latent"])).square().mean()))
        found = result["flow_matching_loss"]["heldout"][level]
        assert found == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_chosen_clips_are_spread_evenly() -> None:
    assert evenly(10, 4) == [1, 3, 6, 8]
    assert evenly(3, 8) == [0, 1, 2] and evenly(5, 1) == [2] and evenly(5, 0) == []


def test_an_evaluation_holds_one_model_at_a_time(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.nn.Module]] = []
    others: list[int] = []

    def loaded(model: torch.nn.Module, cfg: Any) -> torch.nn.Module:
        others.append(sum(one() is not None for one in held))
        held.append(weakref.ref(model))
        return model

    job = make_job(steps=1, repeat_seeds=[1])
    train_stage(job)
    monkeypatch.setattr(heldout, "compiled", loaded)
    evaluate_stage(job)
    assert others == [0] * 4, "teacher, before, after, the other seed"
    gc.collect()
    assert all(one() is None for one in held)
