"""What the study needs of the trainer: other clips, curves, one mass, and jobs that share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.sparse.allocation import OneMass
from gossamer.sparse.attach import method_from_spec
from gossamer.train.calibrate import Calibrator
from gossamer.train.check import preflight
from gossamer.train.config import compose
from gossamer.train.evaluate import measure_masks
from gossamer.train.gauge import Gauge
from gossamer.train.refusal import Refusal
from gossamer.train.run import run
from gossamer.train.samples import evenly, noisy_samples


def test_one_mass_for_all_heads_meets_the_density_on_its_samples(make_job: Any) -> None:
    job = make_job()
    dataset = job.dataset("train")
    samples = noisy_samples([dataset[2], dataset[7]], [0.7, 0.3], 2, job.device)
    calibrator = Calibrator(Gauge(
        job.dense(), method_from_spec(job.method_spec), samples,
        noise_levels=[0.7, 0.3], densities=[0.1, 0.5], probes=1, seed=0,
    ))  # fmt: skip
    for k, sparsity in ((0.0, 0.6), (0.1, 0.75)):
        result = calibrator.run(OneMass(k=k), sparsity=sparsity)
        assert {p for layer in result.p for p in layer} == {result.p[0][0]}
        assert torch.tensor(result.k).flatten().tolist() == pytest.approx([k] * 4)
        # a p is exact to one block of one row
        assert abs(result.planned_density - (1 - sparsity)) < 1e-3
        student = job.student(0).requires_grad_(False).eval()
        result.apply(student)
        measured = measure_masks(student, samples).mean_density
        assert abs(measured - (1 - sparsity)) < 1e-3, "of the sparse model, which sees other q, k"
        heads = torch.tensor([d.tolist() for d in measure_masks(student, samples).density.values()])
        assert heads.std() > 0.01, "one p gives flat heads more"


def test_one_mass_refuses_what_it_cannot_meet(make_job: Any) -> None:
    calibrator = make_job().own_calibrator()
    with pytest.raises(Refusal, match=r"allowed is a share below the density asked for, 0\.1"):
        calibrator.run(OneMass(k=0.5), sparsity=0.9)
    with pytest.raises(Refusal, match="null with allocation=one_mass"):
        calibrator.run(OneMass(), error_budget=0.1)
    tokens = {"policy": "error_budget", "policy__unit": "tokens", "estimator": "error_aware"}
    said = r"policy\.unit=tokens: allowed is blocks with allocation=one_mass"
    with pytest.raises(Refusal, match=said):
        make_job(**tokens).own_calibrator().run(OneMass(), sparsity=0.5)
    with pytest.raises(ValueError, match=r"k=1\.5: allowed is a share"):
        OneMass(k=1.5)


def test_only_some_training_clips_are_taken_and_the_heldout_ones_stay(make_job: Any) -> None:
    job, few = make_job(), make_job(training_data__clips=3)
    whole = job.dataset("train")
    chosen = [whole[i] for i in evenly(len(whole), 3)]
    own = few.dataset("train")
    assert len(own) == 3
    assert own.meta(own[1]["index"]) == whole.meta(evenly(len(whole), 3)[1])
    for i in range(3):
        assert (
            torch.equal(own[i]["latent"], chosen[i]["latent"])
            and own[i]["index"] == chosen[i]["index"]
        )
    assert len(few.dataset("heldout")) == len(job.dataset("heldout"))
    mine, theirs = (j.calibrator(j.dense()).gauge.samples for j in (few, job))
    assert all(torch.equal(a.x, b.x) for a, b in zip(mine, theirs, strict=True)), "not of the few"


def test_another_folder_gives_the_training_clips(lab: Any, make_job: Any, tmp_path: Path) -> None:
    job = make_job(training_data__dir=lab.data)
    preflight(job.cfg, ["calibrate", "train"])
    assert len(job.dataset("train")) == len(make_job().dataset("train"))
    with pytest.raises(Refusal, match=r"a folder with manifest\.json and training clips"):
        preflight(make_job(training_data__dir=tmp_path).cfg, ["train"])
    manifest = json.loads((lab.data / "manifest.json").read_text())
    manifest["codec"]["fingerprint"] = "another"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match="clips of the same codec"):
        preflight(make_job(training_data__dir=tmp_path).cfg, ["train"])
    with pytest.raises(Refusal, match="0 with training_data"):
        preflight(make_job(training_data__clips=2, noise_draws=2).cfg, ["train"])


def test_jobs_of_one_process_find_what_they_find_alone(lab: Any, tmp_path: Path) -> None:
    settings = {
        "stages": ["calibrate", "train", "evaluate"], "steps": 2, "evaluation__every": 1,
        "calibration__seed": 0, "layout": "row_major", "layout__block": None,
        "layout__q_block": 16, "layout__kv_block": 16, "calibration__path": None,
    }  # fmt: skip
    kept: dict[tuple[str, ...], Any] = {}

    def found(name: str, sparsity: float, share: bool) -> dict[str, Any]:
        cfg = compose(lab.student(tmp_path, name=name, sparsity=sparsity, **settings))
        run(cfg, kept=kept if share else None)
        text = (tmp_path / name / "evaluation" / "evaluation.json").read_text()
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curve = [json.loads(row)["heldout_error"] for row in rows]
        timed = ("seconds", "forward_seconds", "made_for")
        return {k: v for k, v in json.loads(text).items() if k not in timed} | {"curve": curve}

    found("other", 0.5, True)
    together, alone = found("together", 0.7, True), found("alone", 0.7, False)
    assert together == alone
    assert len(alone["curve"]) == 3 and len(set(alone["curve"])) == 3
    assert sum(key[0] == "calibrator" for key in kept) == 1, "the measurement is shared"
