"""One p set for the masks of an evaluation, against a count of the masks it gives."""

from typing import Any

import pytest
import torch

from gossamer.sparse.attach import attentions
from gossamer.train.config import compose
from gossamer.train.evaluate import measure_masks
from gossamer.train.match_density import match_density
from gossamer.train.refusal import Refusal
from gossamer.train.run import run
from gossamer.train.samples import noisy_samples

LEVELS = [0.9, 0.3]
STAGES = ["calibrate", "evaluate"]
ONE_P = {"allocation": "one_mass", "calibration__path": None}


def test_p_of_all_heads_moves_to_the_density_and_k_stays(make_job: Any) -> None:
    job = make_job(**ONE_P, allocation__k=0.05)
    run(job.cfg, ["calibrate"])
    student = job.student(0).requires_grad_(False).eval()
    dataset = job.dataset("heldout")
    samples = noisy_samples([dataset[i] for i in range(4)], LEVELS, 3, job.device)  # 3 and 1
    policies = [a.policy for a in attentions(student).values()]
    old_p, old_k = float(policies[0].p[0]), float(policies[0].k[0])
    start = measure_masks(student, samples).mean_density
    for target in (start + 0.06, start - 0.04):
        reached = match_density(student, samples, target)
        assert reached == pytest.approx(measure_masks(student, samples).mean_density, abs=1e-6)
        assert abs(reached - target) < 0.01 < abs(start - target)  # of 32 blocks a row
        p = torch.cat([policy.p for policy in policies])
        torch.testing.assert_close(p, p[:1].expand_as(p))
        assert (float(p[0]) > old_p) is (target > start)
        assert {float(k) for policy in policies for k in policy.k} == {old_k}


def test_an_evaluation_is_at_the_density_that_was_asked_for(make_job: Any) -> None:
    found = {}
    for matched in (False, True):
        job = make_job(
            **ONE_P, evaluation__match_density=matched, name=f"matched-{matched}", stages=STAGES
        )
        result = run(job.cfg, STAGES)
        found[matched] = abs(result["metrics"]["measured_sparsity"] - job.cfg.sparsity)
    assert found[True] < 0.01 < found[False]


@pytest.mark.parametrize(
    "other", [{}, {"policy": "trained_hybrid", "allocation": "one_mass"}, {"allocation": "fixed"}]
)
def test_refused_where_no_p_decides(lab: Any, tmp_path: Any, other: dict[str, Any]) -> None:
    cfg = compose(lab.student(tmp_path, evaluation__match_density=True, **other))
    with pytest.raises(Refusal, match=r"evaluation\.match_density=True: allowed is false where"):
        run(cfg, ["calibrate"])
