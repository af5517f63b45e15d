"""SpargeAttention's tuning as an allocation: each head's p and filter by bounds on its L1 error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gossamer.sparse.allocation import ErrorBound, Fixed, least_within
from gossamer.sparse.attach import attach, attentions, method_from_spec
from gossamer.sparse.attention import SparseAttention
from gossamer.train.calibrate import Calibrator
from gossamer.train.calibration import Calibration
from gossamer.train.gauge import Gauge
from gossamer.train.match_density import check_match
from gossamer.train.measures import Sample
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal
from gossamer.train.run import run
from gossamer.train.samples import noisy_samples
from gossamer.train.stages import REPORT

LEVELS = [0.7, 0.3]
DROP = {"compensation": "drop", "policy__k": 0.0, "allocation": "error_bound"}
FILTER = {**DROP, "compensation": "filtered_drop"}
STEP = 1 / 1024  # of p


def samples_of(job: Any) -> list[Sample]:
    dataset = job.dataset("train")
    return noisy_samples([dataset[2], dataset[7]], LEVELS, 2, job.device)


def calibrator_of(job: Any) -> Calibrator:
    settings = {"noise_levels": LEVELS, "densities": [0.5], "probes": 1, "seed": 0}
    method = method_from_spec(job.method_spec)
    return Calibrator(Gauge(job.dense(), method, samples_of(job), **settings))


def tuned(job: Any, **bounds: float) -> Calibration:
    return calibrator_of(job).run(ErrorBound(**bounds), sparsity=0.5)


def worst(job: Any, p: Any, limit: Any = None) -> torch.Tensor:
    """Each head's greatest relative L1 error [L, H], by attention run on what the teacher sees."""
    teacher, calls = job.dense(), []
    for index, module in enumerate(attentions(teacher).values()):
        module.register_forward_hook(lambda m, args, out, i=index: calls.append((i, args)))
    with torch.no_grad():
        for s in samples_of(job):
            velocity(teacher, s.x, s.t, s.text, s.condition)
    found = torch.zeros(2, 2)
    for index, (q, k, v, grid, t) in calls:
        sparse = SparseAttention(method_from_spec(job.method_spec), 2, q.shape[-1])
        sparse.policy.set_budget(torch.zeros(2), torch.as_tensor(p[index]))
        if limit is not None:
            sparse.compensation.set_limit(torch.as_tensor(limit[index]))
        with torch.no_grad():
            change = sparse(q, k, v, grid, t) - F.scaled_dot_product_attention(q, k, v)
        dense = F.scaled_dot_product_attention(q, k, v)
        error = change.abs().sum((2, 3)) / dense.abs().sum((2, 3))
        found[index] = torch.maximum(found[index], error.amax(0))
    return found


def test_each_head_has_the_least_mass_within_the_bound_on_its_worst_clip(make_job: Any) -> None:
    job = make_job(**DROP)
    found = tuned(job, l1=0.2, l2=0.2)
    p = torch.tensor(found.p)
    assert len(p.unique()) > 1 and found.k == [[0.0, 0.0]] * 2 and found.skip_below == []
    assert (worst(job, p) <= 0.2 + 1e-5).all()
    beyond = worst(job, (p - 1.01 * STEP).clamp(min=0))
    assert ((beyond > 0.2 - 1e-5) | (p < 2 * STEP)).all()
    assert (torch.tensor(found.error) <= 0.2 + 1e-5).all()
    again = tuned(make_job(**DROP), l1=0.2, l2=0.2)
    assert again.p == found.p and again.planned_density == found.planned_density
    kept = tuned(make_job(**{**DROP, "compensation": "centroid"}), l1=0.2, l2=0.2)
    assert kept.planned_density < found.planned_density  # centroids leave less error


def test_no_error_allowed_means_dense_heads(make_job: Any) -> None:
    found = tuned(make_job(**DROP), l1=0.0, l2=0.0)
    assert found.planned_density > 0.9
    assert torch.tensor(found.error).max() < 1e-4


def test_the_filter_is_tuned_after_the_mass_and_goes_with_the_calibration(
    make_job: Any, tmp_path: Path
) -> None:
    job = make_job(**FILTER)
    found = tuned(job, l1=0.1, l2=0.2)
    assert found.p == tuned(make_job(**DROP), l1=0.1, l2=0.2).p
    limit = torch.tensor(found.skip_below)
    assert limit.shape == (2, 2) and (limit < 0).all() and (limit > -50).any()
    assert (worst(job, found.p, limit) <= 0.2 + 1e-5).all()
    assert (worst(job, found.p, (limit + 0.2).clamp(max=0)) > worst(job, found.p)).any()
    found.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert loaded == found
    student = attach(job.source.load(0), method_from_spec(job.method_spec))
    loaded.apply(student)
    for index, attention in enumerate(attentions(student).values()):
        assert torch.equal(attention.compensation.skip_below, limit[index])


def test_a_tuned_filter_does_not_stay_for_the_next_budgets_of_a_teacher(make_job: Any) -> None:
    job = make_job(**FILTER)
    before, after = calibrator_of(job), calibrator_of(job)
    after.run(ErrorBound(l1=0.1, l2=0.2), sparsity=0.5)
    found = after.run(Fixed(), sparsity=0.5)
    alone = before.run(Fixed(), sparsity=0.5)
    assert found.skip_below == alone.skip_below == []
    assert found.chosen["measured_error"] == alone.chosen["measured_error"]


def test_the_stage_calibrates_and_says_what_the_bounds_gave(make_job: Any) -> None:
    job = make_job(**FILTER, calibration__path=None, allocation__l1=0.1, stages=["calibrate"])
    with pytest.raises(ValueError, match=r"l1=0\.1, l2=0\.06: allowed is 0 <= l1 <= l2"):
        run(job.cfg, ["calibrate"])
    job = make_job(**FILTER, calibration__path=None, allocation__l1=0.02, stages=["calibrate"])
    run(job.cfg, ["calibrate"])
    said = (job.calibration_dir / REPORT).read_text()
    assert "relative L1 error is at most 0.02 on every calibration clip (allocation.l1)" in said
    assert "keeps that error within 0.06 (allocation.l2)" in said
    assert "the sparsity is what comes of it" in said and "budgets are Top-k" not in said


def test_its_masks_can_be_compared_at_an_equal_density(make_job: Any) -> None:
    check_match(make_job(**DROP, evaluation__match_density=True).cfg)
    with pytest.raises(Refusal, match="match_density"):
        check_match(make_job(evaluation__match_density=True).cfg)


@pytest.mark.parametrize(
    ("settings", "asked", "said"),
    [
        (DROP, {"error_budget": 0.1}, r"error_budget=0\.1: allowed is null with allocation=error_"),
        (
            {
                "policy": "error_budget",
                "policy__unit": "tokens",
                "estimator": "error_aware",
                "allocation": "error_bound",
            },
            {"sparsity": 0.5},
            r"policy\.unit=tokens: allowed is blocks with allocation=error_bound",
        ),
    ],
)
def test_what_has_no_bound_to_meet_is_refused(
    make_job: Any, settings: dict[str, Any], asked: dict[str, float], said: str
) -> None:
    job = make_job(**settings)
    one = job.calibrator(job.dense(), [0])
    with pytest.raises(Refusal, match=said):
        one.run(ErrorBound(), **asked)


def test_the_least_values_within_a_bound_are_found_by_bisection() -> None:
    wanted = torch.tensor([[0.3, 0.7], [0.0, 2.0]])
    found = least_within(lambda x: (wanted - x).clamp(min=0), 0.0, like=wanted, most=1.0, steps=12)
    assert torch.allclose(found, wanted.clamp(max=1), atol=2**-12) and (found[0] >= wanted[0]).all()
