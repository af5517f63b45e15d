"""Calibration: budgets that meet the sparsity, from errors that a head's sparsity really causes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.sparse.allocation import Allocation, EqualError, Fixed, Uniform, WaterFill
from gossamer.sparse.attach import attach, attentions, method_from_spec
from gossamer.sparse.attention import DenseAttention
from gossamer.train import gauge
from gossamer.train.calibrate import BISECTIONS, Calibrator
from gossamer.train.calibration import CALIBRATION, Calibration
from gossamer.train.evaluate import measure_masks, velocities
from gossamer.train.gauge import Gauge
from gossamer.train.refusal import Refusal
from gossamer.train.run import run
from gossamer.train.samples import noisy_samples
from gossamer.train.stages import REPORT
from gossamer.train.weights import digest

LEVELS = [0.7, 0.3]
BLOCKS = 32  # a row of the tiny teacher
RAGGED = [2, 3, 3]  # tiles that the grid's sizes do not divide by
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "mass": EqualError(measure="mass"),
    "error": EqualError(measure="relative_l1"),
    "output": WaterFill(measure="output"),
    "fisher": WaterFill(measure="fisher"),
    "velocity": WaterFill(measure="velocity"),
    "exact": WaterFill(measure="velocity_exact"),
}


def samples_of(job: Any) -> list[Any]:
    dataset = job.dataset("train")
    return noisy_samples([dataset[2], dataset[7]], LEVELS, 2, job.device)


def calibrator(job: Any, probes: int = 2) -> Calibrator:
    return Calibrator(
        Gauge(
            job.dense(),
            method_from_spec(job.method_spec),
            samples_of(job),
            noise_levels=LEVELS,
            densities=[0.1, 0.25, 0.5, 0.75],
            probes=probes,
            seed=0,
        )
    )


def calibrated_at(job: Any, sparsity: float, probes: int = 2) -> Calibration:
    return calibrator(job, probes).run(WaterFill(measure="velocity"), sparsity=sparsity)


def sparse_model(job: Any) -> Any:
    """The teacher's weights with the run's sparse attention, budgets not set."""
    model = attach(job.source.load(0), method_from_spec(job.method_spec))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("block", [[1, 2, 2], RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_the_planned_density_is_the_target_within_one_block_of_one_head(
    make_job: Any, name: str, block: list[int]
) -> None:
    job = make_job(layout__block=block)
    one = calibrator(job)
    for sparsity in (0.3, 0.75):
        result = one.run(ALLOCATIONS[name], sparsity=sparsity)
        heads = len(result.layers) * result.num_heads
        largest = 18 if block == RAGGED else 4  # tokens of 128
        assert result.target_density == pytest.approx(1 - sparsity)
        assert abs(result.planned_density - (1 - sparsity)) <= largest / 128 / heads
        student = sparse_model(job)
        result.apply(student)
        # a student's masks deviate from the plan only as far as earlier layers change q and k
        measured = measure_masks(student, samples_of(job)).mean_density
        assert abs(measured - (1 - sparsity)) < 2 / BLOCKS
    assert all(isinstance(a, DenseAttention) for a in attentions(one.gauge.teacher).values())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 1 - 1 / BLOCKS])
def test_every_sparsity_is_planned_exactly(make_job: Any, sparsity: float) -> None:
    result = calibrated_at(make_job(), sparsity)
    heads = len(result.layers) * result.num_heads
    assert abs(result.planned_density - (1 - sparsity)) <= 1 / BLOCKS / heads
    assert min(mass for layer in result.captured_mass for head in layer for mass in head) > 0


def test_calibrating_twice_gives_the_same_bytes(make_job: Any, tmp_path: Path) -> None:
    for name in "ab":
        found = dataclasses.replace(calibrated_at(make_job(), 0.6), seconds=0)
        found.save(tmp_path / name)
    assert (tmp_path / "a" / CALIBRATION).read_bytes() == (
        tmp_path / "b" / CALIBRATION
    ).read_bytes()


def true_errors(job: Any, head: tuple[int, int], k: float) -> torch.Tensor:
    """Return each sample's squared relative velocity error with only one head sparse."""
    samples = samples_of(job)
    target = velocities(job.dense(), samples, "teacher")
    student = sparse_model(job)
    policies = [attention.policy for attention in attentions(student).values()]
    for policy in policies:
        ones = torch.ones_like(policy.k)
        policy.set_budget(ones, torch.zeros_like(ones))
    policies[head[0]].k[head[1]] = k
    true = [
        (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        for mine, theirs in zip(velocities(student, samples, ""), target, strict=True)
    ]
    return torch.stack(true).square().mean(1)  # [level]


@pytest.mark.parametrize(
    ("name", "probes", "rel"), [("velocity", 64, 0.3), ("exact", 1, 1e-3)], ids=["probes", "exact"]
)
def test_the_error_of_a_head_is_that_of_the_model_with_only_this_head_sparse(
    make_job: Any, name: str, probes: int, rel: float
) -> None:
    job = make_job()
    result = calibrator(job, probes).run(ALLOCATIONS[name], sparsity=0.6)
    for layer in range(len(result.layers)):
        for head in range(result.num_heads):
            for point in (1, 2):  # densities 0.25 and 0.5
                true = true_errors(job, (layer, head), result.curve_densities[point])
                found = torch.tensor(result.curve_error[layer][head])[:, point]
                assert found.mean() == pytest.approx(float(true.mean()), rel=rel)
                if name == "exact":
                    assert found.tolist() == pytest.approx(true.tolist(), rel=rel)


def test_the_sparse_model_has_the_error_that_calibration_says(make_job: Any) -> None:
    job = make_job()
    result = calibrated_at(job, 0.75)
    student = sparse_model(job)
    result.apply(student)
    samples = samples_of(job)
    target = velocities(job.dense(), samples, "")
    for level, (mine, theirs) in enumerate(
        zip(velocities(student, samples, ""), target, strict=True)
    ):
        error = (mine - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        said = result.chosen["measured_error"][level]
        assert said == pytest.approx(float(error.mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["uniform", "velocity"])
def test_an_error_budget_finds_the_sparsity_that_meets_it(make_job: Any, name: str) -> None:
    one = calibrator(make_job(), probes=8)
    loose, tight = (one.run(ALLOCATIONS[name], error_budget=e) for e in (0.05, 0.03))
    for result, asked in ((loose, 0.05), (tight, 0.03)):
        measured = torch.tensor(result.chosen["measured_error"]).mean()
        assert measured <= asked
        less = result.target_density * BLOCKS ** (-(0.5**BISECTIONS))  # one step of the bisection
        sparser = one.run(ALLOCATIONS[name], sparsity=1 - less)
        assert torch.tensor(sparser.chosen["measured_error"]).mean() > asked
    assert loose.planned_density < tight.planned_density


def test_the_policys_own_budget_is_kept_by_fixed_and_measured_as_it_runs(make_job: Any) -> None:
    job = make_job(policy__k=0.2, policy__p=0.4)
    one = calibrator(job)
    found = one.run(Fixed(), sparsity=0.5)
    assert found.k == [pytest.approx([0.2] * 2)] * 2 and found.p == [pytest.approx([0.4] * 2)] * 2
    assert (found.target_density, found.curve_error, found.error, found.clips) == (0.5, [], [], 2)
    student = sparse_model(job)
    found.apply(student)
    measured = measure_masks(student, samples_of(job))
    first = found.layers[0]  # whose q and k do not depend on other layers' masks
    mass = torch.tensor(found.captured_mass)[0].mean(1)
    assert mass.tolist() == pytest.approx(measured.recall[first].tolist(), rel=1e-5)
    assert not attentions(one.gauge.teacher)[first]._forward_hooks
    with pytest.raises(Refusal, match=r"error_budget=0\.1: allowed is null with allocation=fixed"):
        one.run(Fixed(), error_budget=0.1)


def test_numbers_that_the_masks_do_not_take_are_refused_in_one_line(make_job: Any) -> None:
    job = make_job()
    edited = dataclasses.replace(job.calibration, k=[[1.5] * len(row) for row in job.calibration.k])
    with pytest.raises(Refusal, match=r"^calibration=calibration\.json: .* k=\[1\.5, 1\.5\]"):
        edited.apply(sparse_model(job))


def test_each_head_takes_the_order_with_the_least_error(make_job: Any, tmp_path: Path) -> None:
    names = "[row_major,temporal_major,tiles]"
    settings = {"layout__block": None, "layout": "per_head", "layout__tile": "[1,2,2]"}
    sizes = {"layout__q_block": 4, "layout__kv_block": 4}
    job = make_job(**settings, **sizes, layout__names=names)
    found = calibrator(job).run(WaterFill(measure="output"), sparsity=0.75)
    alone = [
        calibrator(make_job(**settings, **sizes, layout__names=f"[{name}]")).run(
            WaterFill(measure="output"), sparsity=0.75
        )
        for name in ("row_major", "temporal_major", "tiles")
    ]
    errors = torch.tensor([one.curve_error for one in alone]).mean(3)[..., 1]  # [order, L, H]
    assert found.layout_choice == errors.argmin(0).tolist()
    assert sum(found.chosen["heads_by_order"].values()) == 4
    assert found.planned_density == pytest.approx(0.25, abs=1 / BLOCKS / 4)
    found.save(tmp_path)
    model = sparse_model(job)
    Calibration.load(tmp_path).apply(model)
    choices = [attention.layout.choice.tolist() for attention in attentions(model).values()]
    assert choices == found.layout_choice


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"layout": "per_head", "layout__tile": "[1,2,2]", "evaluation__batch_size": 1}),
        (3, {"allocation": "one_mass", "sparsity": 0.7}),  # of 2 samples
        (2, {"sparsity": "null", "error_budget": 0.1, "evaluation__batch_size": 1}),
    ],
    ids=["orders", "fewer samples than processes", "error budget"],
)
def test_processes_share_the_samples_and_write_the_calibration_of_one(
    processes: int, settings: dict[str, Any], lab: Any, launcher: Any, tmp_path: Path
) -> None:
    if "layout" in settings:
        settings |= {"layout__block": None, "layout__q_block": 4, "layout__kv_block": 4}
    settings |= {"stages": ["calibrate"], "calibration__path": None}
    assert launcher.run(lab.student(tmp_path, name="one", **settings)).code == 0
    done = launcher.ranks(lab.student(tmp_path, name="all", **settings), processes=processes)
    assert [one.code for one in done] == [0] * processes, done[0].text
    assert [one.text for one in done[1:]] == [""] * (processes - 1)
    one, together = (
        (tmp_path / name / "calibration" / CALIBRATION).read_text() for name in ("one", "all")
    )

    def timeless(text: str) -> str:
        return text.replace(f'"seconds": {json.loads(text)["seconds"]}', "")

    assert timeless(one) == timeless(together) != one


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 0.8, "allocation": "one_mass", "allocation.k": 0.5}, "allocation.k=0.5"),
        ({"inject": "refuse_the_first_sample"}, "sample=first: allowed is none"),
    ],
    ids=["all alike", "one alone"],
)
def test_a_refusal_while_calibrating_ends_all_processes_and_is_said_once(
    settings: dict[str, Any], said: str, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    inject = settings.pop("inject", "")
    overrides = lab.student(tmp_path, stages=["calibrate"], calibration__path=None, **settings)
    done = launcher.ranks(overrides, inject=inject and f"{__file__}:{inject}")
    assert [one.code for one in done] == [2, 2], done[0].text
    assert len(done[0].errors) == 1 and said in done[0].errors[0] and done[1].text == ""


def refuse_the_first_sample() -> None:
    """Let the process that measures the first noise level refuse: of two, the first one."""
    visit = gauge.visit_layers

    def refusing(teacher: Any, sample: Any, *args: Any, **options: Any) -> None:
        if sample.level == 0:
            raise Refusal("sample", "first", "none", "leave it out")
        visit(teacher, sample, *args, **options)

    gauge.visit_layers = refusing


def test_calibrate_says_what_it_chose_and_draws_each_head_and_level(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path, stages=["calibrate"], calibration__path=None))
    for said in (
        "captured attention mass of each head by noise level:",
        "relative velocity error (to first order) of each head by noise level:",
        "density by head: ",
        "the last block given was worth",
        "relative velocity error of the sparse model: ",
    ):
        assert said in done.text, said
    names = {path.name for path in (tmp_path / "student" / "calibration").iterdir()}
    assert names == {
        CALIBRATION,
        REPORT,
        *(f"{n}{d}.png" for n in ("mass", "error") for d in ("", "-dark")),
    }


def test_a_run_to_an_error_budget_trains_evaluates_and_exports(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    stages = ["calibrate", "train", "evaluate", "export", "report"]
    done = launcher.run(
        lab.student(
            tmp_path,
            sparsity="null",
            error_budget=0.15,
            steps=2,
            stages=stages,
            calibration__path=None,
        )
    )
    assert done.code == 0, done.text
    assert "asked: error_budget 0.15" in done.text
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert result["metrics"]["requested_sparsity"] is None
    assert 0.05 < result["metrics"]["measured_sparsity"] < 0.99


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"error_budget": 0.1}, "error_budget=0.1: allowed is either sparsity or error_budget"),
        ({"sparsity": "null"}, "error_budget=null: allowed is either sparsity or error_budget"),
        ({"sparsity": "null", "error_budget": 0}, "error_budget=0: allowed is null or a finite"),
        (
            {"sparsity": "null", "error_budget": 0.1, "allocation": "fixed"},
            "null with allocation=fixed",
        ),
        ({"allocation": "velocity", "allocation.measure": "loss"}, "measure=loss: allowed is mass"),
        ({"allocation": "best"}, "allocation=best: allowed is error, error_bound, fixed, mass"),
    ],
)
def test_a_wrong_knob_is_refused_in_one_line(
    settings: dict[str, Any], said: str, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, stages=["calibrate"], calibration__path=None, **settings)
    done = launcher.run(overrides)
    assert done.code == 2 and said in done.errors[0], done.text


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


def test_a_calibration_of_another_format_says_which(make_job: Any, tmp_path: Path) -> None:
    calibrated_at(make_job(), 0.5).save(tmp_path)
    file = tmp_path / CALIBRATION
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 3}))
    with pytest.raises(Refusal, match="its format_version is 3, this gossamer reads 2"):
        Calibration.load(tmp_path)


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


@pytest.mark.case("F9")
def test_a_forced_change_of_sparsity_calibrates_again_and_takes_the_new_masks(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    assert launcher.run(lab.student(tmp_path, calibration__path=None)).code == 0
    changed = lab.student(tmp_path, sparsity=0.8, steps=12, resume="force", calibration__path=None)
    done = launcher.run(changed)
    assert done.code == 0 and "calibrating again: sparsity: 0.6, now 0.8" in done.text
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").open()]
    assert len(rows) == 12
    assert all(abs(row["density"] - (0.4 if row["step"] <= 8 else 0.2)) < 0.06 for row in rows)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layers": []}', '{"format_version": 3}', '{"format_version": 2}']
)
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


@pytest.mark.parametrize("changed", ["proj_out.bias", "blocks.0.attn1.to_q.weight"])
def test_weights_are_told_apart(changed: str, make_job: Any) -> None:
    first, second = make_job().dense(), make_job().student(0)
    assert digest(first) == digest(second)
    with torch.no_grad():
        second.get_parameter(changed).view(-1)[0] += 1e-6
    assert digest(first) != digest(second)
