"""What calibration derives beside k: exact budgets in pairs, orders against clusters, reasons."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.sparse.allocation import Uniform, WaterFill
from gossamer.sparse.attach import attach, attentions, method_from_spec
from gossamer.sparse.layouts.per_head import CLUSTERS, PerHead
from gossamer.train import calibrate
from gossamer.train.calibrate import Calibrator
from gossamer.train.calibration import Calibration
from gossamer.train.check import preflight
from gossamer.train.evaluate import measure_masks
from gossamer.train.gauge import Gauge
from gossamer.train.refusal import Refusal
from gossamer.train.reporting.calibration import lines
from gossamer.train.samples import noisy_samples

LEVELS = [0.7, 0.3]
CLUSTERED = {
    "layout": "semantic_clusters",
    "layout__block": None,
    "layout__num_q": 32,
    "layout__num_kv": 32,
}
EAR = {"estimator": "error_aware", "policy": "error_budget"}
IN_PAIRS: dict[str, dict[str, Any]] = {
    "clusters": {**CLUSTERED, "policy": "token_hybrid"},
    "clusters by error": {**CLUSTERED, **EAR, "policy__unit": "tokens"},
    "clusters by error of a layer": {
        **CLUSTERED,
        **EAR,
        "policy__unit": "tokens",
        "policy__scope": "layer",
    },
}


def samples_of(job: Any, split: str = "train") -> list[Any]:
    dataset = job.dataset(split)
    return noisy_samples([dataset[0], dataset[3]], LEVELS, 2, job.device)


def calibrator(job: Any) -> Calibrator:
    return Calibrator(
        Gauge(
            job.dense(),
            method_from_spec(job.method_spec),
            samples_of(job),
            noise_levels=LEVELS,
            densities=[0.1, 0.25, 0.5],
            probes=2,
            seed=0,
        )
    )


def measured(job: Any, found: Calibration, split: str) -> float:
    model = attach(job.source.load(0), method_from_spec(job.method_spec)).requires_grad_(False)
    found.apply(model)
    return measure_masks(model.eval(), samples_of(job, split)).mean_density


@pytest.mark.parametrize("name", IN_PAIRS)
def test_budgets_in_pairs_have_the_sparsity_asked_for_on_other_clips_too(
    make_job: Any, name: str
) -> None:
    job = make_job(**IN_PAIRS[name])
    one = calibrator(job)
    for allocation, sparsity in ((WaterFill(measure="velocity"), 0.6), (Uniform(), 0.8)):
        found = one.run(allocation, sparsity=sparsity)
        assert found.planned_density == pytest.approx(1 - sparsity, abs=1e-3)
        assert measured(job, found, "heldout") == pytest.approx(1 - sparsity, abs=1e-3)


@pytest.mark.parametrize("block", ["[1,2,2]", "[1,3,3]"], ids=["even", "ragged"])
def test_error_budgets_in_blocks_are_planned_within_one_block_of_one_head(
    make_job: Any, block: str
) -> None:
    job = make_job(**EAR, layout__block=block)
    found = calibrator(job).run(WaterFill(measure="velocity"), sparsity=0.7)
    largest = 4 if block == "[1,2,2]" else 9  # tokens of 128
    assert abs(found.planned_density - 0.3) <= largest / 128 / 4


def test_an_error_budget_in_pairs_says_the_density_that_it_found(make_job: Any) -> None:
    job = make_job(**IN_PAIRS["clusters"])
    found = calibrator(job).run(WaterFill(measure="velocity"), error_budget=0.01)
    assert found.target_density == pytest.approx(found.planned_density, abs=1e-6)
    assert sum(found.chosen["measured_error"]) / 2 <= 0.01
    assert measured(job, found, "train") == pytest.approx(found.target_density, abs=1e-3)


@pytest.mark.parametrize("policy", [{}, EAR])
def test_shares_of_blocks_of_any_size_are_refused_but_with_fixed_or_trained_budgets(
    make_job: Any, policy: dict[str, Any]
) -> None:
    settings = {**CLUSTERED, **policy, "calibration__path": None}
    with pytest.raises(Refusal, match=r"policy=.* in blocks: allowed is token_hybrid, .*; set"):
        preflight(make_job(**settings).cfg, ["calibrate"])
    fixed = {"allocation": "fixed", "sparsity": 0.5}
    preflight(make_job(**settings, **fixed).cfg, ["calibrate"])
    trained = {**settings, "policy": "trained_hybrid"}
    preflight(make_job(**trained).cfg, ["calibrate"])


def test_a_sparsity_that_clusters_cannot_have_is_refused_in_one_line(make_job: Any) -> None:
    job = make_job(**{**IN_PAIRS["clusters"], "layout__num_kv": 2})
    with pytest.raises(Refusal, match=r"sparsity=0\.9: allowed is at most .* must stay\); lower"):
        calibrator(job).run(Uniform(), sparsity=0.9)


PER_HEAD = {
    "layout": "per_head",
    "layout__block": None,
    "layout__tile": "[1,2,2]",
    "layout__q_block": 4,
    "layout__kv_block": 4,
}


def curve_at(job: Any, order: str, sparsity: float) -> torch.Tensor:
    """Return each head's error [L, H] with all heads in one order, near the density."""
    layout = {"_target_": f"{PerHead.__module__}.PerHead", "names": [order], "tile": [1, 2, 2]}
    spec = {**job.method_spec, "layout": {**layout, "q_block": 4, "kv_block": 4}}
    alone = Calibrator(
        Gauge(
            job.dense(),
            method_from_spec(spec),
            samples_of(job),
            noise_levels=LEVELS,
            densities=[0.1, 0.25, 0.5],
            probes=2,
            seed=0,
        )
    ).run(WaterFill(measure="output"), sparsity=sparsity)
    return torch.tensor(alone.curve_error).mean(2)[..., 1]


@pytest.mark.parametrize("allowed", [True, False], ids=["clusters too", "static only"])
def test_orders_are_compared_with_the_error_in_clusters(
    make_job: Any, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = ["row_major", "tiles"]
    names = [*static, CLUSTERS] if allowed else static
    job = make_job(**PER_HEAD, layout__names=f"[{','.join(names)}]")
    errors = torch.stack([curve_at(job, name, 0.75) for name in [*static, CLUSTERS]])
    ratio = errors[:2].amin(0) / errors[2]
    assert calibrate.WITHIN == 1.2
    within = float(ratio.flatten().sort()[0][1:3].mean())  # so that both kinds of head are there
    monkeypatch.setattr(calibrate, "WITHIN", within)
    found = calibrator(job).run(WaterFill(measure="output"), sparsity=0.75)
    is_near = ratio <= within
    best = errors[:2].argmin(0)
    expected = torch.where(is_near, best, 2) if allowed else best
    assert found.layout_choice == expected.tolist()
    assert found.chosen["far_from_clusters"] == int((~is_near).sum())
    assert int(is_near.sum()) == 2
    over = errors.gather(0, expected[None])[0] / errors[2]
    assert found.chosen["over_clusters"][1] == pytest.approx(float(over.max()), rel=1e-4)
    assert measured(job, found, "heldout") == pytest.approx(0.25, abs=1 / 32)
    said = "\n".join(lines(found))
    assert ("sorted_clusters in layout.names serves them" in said) is not allowed


def test_the_report_says_what_was_chosen_why_and_how_to_set_it(make_job: Any) -> None:
    job = make_job(**{**IN_PAIRS["clusters"], "layout__num_q": None})
    found = calibrator(job).run(WaterFill(measure="velocity"), sparsity=0.6)
    said = "\n".join(lines(found))
    for part in (
        "layout: SemanticClusters, 1 x 32 blocks of any size",
        "clusters in each head: 1 of q (128 video tokens / 128), 32 of k (as set)",
        "(layout.num_q, layout.num_kv)",
        "tokens are clustered again at every step of a sampler",
        "layout.keep_until",
        "of the token pairs, one for each head, since their errors (velocity) differ",
        "p: 0 for all heads",
        "one budget serves all levels",
        "Proposition 1",
    ):
        assert part in said, part
    layer = found.layers[0]
    rows = [line for line in said.splitlines() if line.startswith(f"{layer} head 1 ")]
    assert [float(x) for x in rows[0].split()[3:5]] == pytest.approx(
        found.captured_mass[0][1], rel=5e-3
    )
    assert len(rows) == 2  # of the mass and of the error
    fixed = "\n".join(lines(calibrator(make_job()).run(Uniform(), sparsity=0.5)))
    assert "Tiles, 32 x 32 blocks of 4 x 4 tokens" in fixed
    assert "the same for all heads (allocation=uniform)" in fixed


def test_calibration_prints_a_bound_that_holds_for_each_layer(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path, stages=["calibrate"], calibration__path=None))
    folder = tmp_path / "student" / "calibration"
    found = Calibration(**json.loads((folder / "calibration.json").read_text()))
    assert len(found.map_bound) == len(found.layers)
    for error, probe, spread in found.map_bound:
        assert 0 < error <= probe + spread and probe > 0 and spread > 0
    written = (folder / "calibration.txt").read_text().splitlines()
    assert written == lines(found)
    assert all(line in done.text for line in written)
    assert sum(" of at most " in line for line in written) == len(found.layers)


def test_heads_of_a_student_follow_their_own_orders(make_job: Any) -> None:
    job = make_job(**PER_HEAD, layout__names=f"[row_major,{CLUSTERS}]")
    found = calibrator(job).run(WaterFill(measure="output"), sparsity=0.75)
    model = attach(job.source.load(0), method_from_spec(job.method_spec))
    found.apply(model)
    choices = [a.layout.choice.tolist() for a in attentions(model).values()]
    assert choices == found.layout_choice


def test_a_density_that_no_mask_has_is_refused_with_the_nearest_one(
    make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calibrator(make_job(**IN_PAIRS["clusters"]))
    monkeypatch.setattr(Gauge, "density", lambda gauge, k: torch.full_like(k, 0.75))
    with pytest.raises(Refusal, match=r"sparsity=0\.7: .*the nearest is 0\.2500"):
        found.budgets(Uniform(), sparsity=0.7)
