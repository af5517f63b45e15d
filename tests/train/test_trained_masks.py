"""Whole jobs that train their masks: the loss falls, the density stays, the export repeats it."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gossamer
from gossamer.sparse.attach import STATE_NAME, mask_parameters, mask_state
from gossamer.train import checkpoint
from gossamer.train.evaluate import velocities
from gossamer.train.loop import TrainSettings
from gossamer.train.progress import parameter_groups
from gossamer.train.samples import noisy_samples

OPTIONS: dict[str, dict[str, Any]] = {
    "budgets": {"policy": "trained_hybrid"},
    "router": {"estimator": "router"},
    "gate": {"compensation": "gated_centroid"},
    "linear": {"compensation": "linear"},
}
ALL = {**OPTIONS["budgets"], **OPTIONS["router"], **OPTIONS["gate"]}
DENSITY = 0.375  # 24 of 64 blocks
COMMON = {
    "layout__block": [1, 1, 2],
    "sparsity": 1 - DENSITY,
    "steps": 12,
    "checkpoint_every": 6,
    "stages": ["calibrate", "train", "export"],
    "loss": "flow_matching",  # in a few steps it falls by more than its noise
    "ema": 0.5,
    "calibration__path": None,
}
POLICY = {"allocation": "fixed", "policy__k": DENSITY}


def rows(run: Any) -> dict[str, np.ndarray]:
    import json

    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    return {key: np.array([row[key] for row in found]) for key in found[0]}


def finished(lab: Any, launcher: Any, runs: Any, **settings: Any) -> Any:
    done = launcher.run(lab.student(runs, **{**COMMON, **settings}))
    assert done.code == 0, done.text
    if "export" in {**COMMON, **settings}["stages"]:
        assert "velocities equal the trained student's bit for bit" in done.text
    return lab.run(runs)


@pytest.fixture(scope="module")
def untrained(lab: Any, launcher: Any, made_once: Any) -> Any:
    return lab.run(made_once("untrained", lambda runs: finished(lab, launcher, runs, **POLICY)))


@pytest.fixture(scope="module")
def together(lab: Any, launcher: Any, made_once: Any) -> Any:
    """A run that trains budgets, router and gate at once."""
    return lab.run(made_once("together", lambda runs: finished(lab, launcher, runs, **ALL)))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_job_trains_its_masks_and_exports_them(
    name: str, untrained: Any, lab: Any, launcher: Any, make_job: Any, tmp_path: Any
) -> None:
    settings = {**OPTIONS[name], **POLICY}
    run = finished(lab, launcher, tmp_path, **settings)
    found = rows(run)
    assert found["loss"][-4:].mean() < 0.97 * found["loss"][:4].mean()
    assert np.abs(found["density"] - DENSITY).max() < 0.005
    if name != "linear":  # which starts at drop, not at centroid
        assert found["loss"][0] == rows(untrained)["loss"][0]
    assert (found["mask_grad_norm"] > 0).all()

    calibration = run.folder / "calibration"
    job = make_job(**{**COMMON, **settings, "calibration__path": calibration})
    tensors, _ = checkpoint.load(run.newest)
    student = job.student(0)
    student.load_state_dict({**tensors["model"], **tensors["ema"]})
    start = {n: p.detach().clone() for n, p in mask_parameters(job.student(0)).items()}
    moved = {n for n, p in mask_parameters(student).items() if not torch.equal(p, start[n])}
    assert moved == set(start) and moved
    assert not {n for n in tensors["ema"] if ".attn1.processor." in n}
    saved = load_file(run.folder / "export" / STATE_NAME)
    assert saved.keys() == mask_state(student).keys()
    dataset = job.dataset("heldout")
    samples = noisy_samples([dataset[0], dataset[3]], [0.8, 0.2], 2, job.device)
    again = gossamer.load_pipeline(run.folder / "export").transformer
    mine, theirs = (velocities(m.eval(), samples, "compare") for m in (student, again))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_calibrated_budgets_keep_the_density_while_everything_trains(together: Any) -> None:
    found = rows(together)
    assert found["loss"][-4:].mean() < 0.97 * found["loss"][:4].mean()
    # With Top-p it depends on the noise of each batch: the mean of some.
    assert abs(found["density"][-6:].mean() - DENSITY) < 0.005
    assert np.isfinite(found["density_price"]).all()


def test_recomputing_changes_no_bit(together: Any, lab: Any, launcher: Any, tmp_path: Any) -> None:
    again = finished(
        lab, launcher, tmp_path, **ALL, gradient_checkpointing=True, stages=["calibrate", "train"]
    )
    assert again.losses == together.losses and again.weights == together.weights


def test_a_killed_run_ends_as_the_unbroken_one(
    together: Any, lab: Any, launcher: Any, tmp_path: Any
) -> None:
    settings = {**COMMON, **ALL}
    killed = launcher.run(lab.student(tmp_path, **settings), fault=(1, "after-rename"))
    assert killed.code == -9
    run = finished(lab, launcher, tmp_path, **ALL)
    assert run.losses == together.losses and run.weights == together.weights
    assert checkpoint.load(run.newest)[1] == checkpoint.load(together.newest)[1]


@pytest.mark.multi
def test_two_processes_train_the_same_masks(
    together: Any, lab: Any, launcher: Any, tmp_path: Any
) -> None:
    stages = ["calibrate", "train"]
    done = launcher.ranks(lab.student(tmp_path, **{**COMMON, **ALL, "stages": stages}))
    assert [one.code for one in done] == [0, 0], done[0].text
    mine, theirs = rows(lab.run(tmp_path)), rows(together)
    np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-3)
    np.testing.assert_allclose(mine["density"], theirs["density"], atol=0.004)


def test_mask_parameters_have_groups_of_their_own(make_job: Any) -> None:
    student = make_job(policy="trained_hybrid", compensation="linear").student(0)
    settings = TrainSettings(steps=1, batch_size=1, mask_numbers=7.0, mask_matrices=3.0)
    weights, numbers, matrices = parameter_groups(student, settings)
    masks = mask_parameters(student)
    count = len(list(student.parameters()))
    assert len(weights["params"]) == count - len(masks) and weights["weight_decay"] == 0.01
    assert [g["lr_multiple"] for g in (weights, numbers, matrices)] == [1, 7, 3]
    assert numbers["weight_decay"] == matrices["weight_decay"] == 0
    assert len(numbers["params"]) == 2 * 2 and len(matrices["params"]) == 2
    plain = make_job().student(0)
    assert len(parameter_groups(plain, settings)) == 1
