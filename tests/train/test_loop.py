"""The training loop: one optimizer step is the same however its batch is split or recomputed."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.sparse.attach import attentions
from gossamer.train import checkpoint, loop
from gossamer.train.config import build
from gossamer.train.distiller import Distiller
from gossamer.train.losses import VelocityDistillation
from gossamer.train.refusal import Refusal
from gossamer.train.stages import train_stage
from gossamer.train.trackers import NoTracker


def train(
    job: Any, folder: Path, loss: Any = None, watch: Any = None, **settings: Any
) -> loop.Progress:
    """Train the job's student for a few steps in this process."""
    student = job.student(0)
    distiller = Distiller(student, job.teacher(), loss or build(job.cfg.loss), job.draws(0))
    values = {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 2, **settings}
    return loop.train(
        distiller,
        job.dataset("train"),
        job.accelerator,
        loop.TrainSettings(**values),
        folder=folder,
        tracker=NoTracker(),
        watch=watch,
    )


def losses(lab: Any, folder: Path) -> np.ndarray:
    """Return [steps, (step, loss, lr, gradient norm)]."""
    return np.array(lab.run(folder.parent, folder.name).losses)


def test_the_parts_of_a_batch_do_not_change_the_losses(
    make_job: Any, lab: Any, tmp_path: Path
) -> None:
    job = make_job(loss="flow_matching")  # distillation's loss is a small difference: rounding
    for parts in (1, 2, 4):
        train(job, tmp_path / str(parts), grad_accumulation=parts, lr=1e-4)
    whole = losses(lab, tmp_path / "1")
    for parts in (2, 4):
        split = losses(lab, tmp_path / str(parts))
        np.testing.assert_allclose(split[:, :3], whole[:, :3], rtol=1e-6)
        np.testing.assert_allclose(split[:, 3], whole[:, 3], rtol=1e-5)  # the gradient's norm


@pytest.mark.case("N14")
def test_gradient_checkpointing_changes_no_bit_and_computes_each_mask_once(
    make_job: Any, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.sparse.estimators.mean_pool import MeanPool

    estimate, calls = MeanPool.__call__, []

    def counted(self: MeanPool, *args: Any) -> Any:
        calls.append(1)
        return estimate(self, *args)

    monkeypatch.setattr(MeanPool, "__call__", counted)
    counts = {}
    for recompute in (False, True):
        calls.clear()
        progress = train(make_job(gradient_checkpointing=recompute), tmp_path / str(recompute))
        counts[recompute] = len(calls)
        assert progress.student.is_gradient_checkpointing is recompute
    layers = len(attentions(progress.student))
    assert counts == {False: 4 * layers, True: 4 * layers}
    assert (losses(lab, tmp_path / "True") == losses(lab, tmp_path / "False")).all()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = loop.TrainSettings(steps=110, batch_size=1, lr=2.0, warmup=10, final_lr=0.25)
    assert [settings.lr_at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert settings.lr_at(60) == pytest.approx((2.0 + 0.5) / 2)
    assert settings.lr_at(110) == pytest.approx(0.5)
    assert all(settings.lr_at(s) > settings.lr_at(s + 1) for s in range(10, 110))


def test_the_averaged_weights_follow_their_recursion(make_job: Any, tmp_path: Path) -> None:
    job, seen = make_job(), []

    class Watching(VelocityDistillation):
        def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
            seen.append(weight.detach().clone())
            return super().__call__(student, teacher, target)

    student = job.student(0)
    weight = student.get_parameter("proj_out.weight")
    job.student = lambda seed: student
    progress = train(job, tmp_path, Watching(), ema=0.75)
    average = seen[0]
    for after in [*seen[1:], weight.detach()]:
        average = 0.75 * average + 0.25 * after
    torch.testing.assert_close(progress.ema["proj_out.weight"], average, rtol=1e-6, atol=1e-7)


@pytest.mark.case("N1")
def test_losses_that_stay_not_finite_stop_in_one_line_and_keep_the_checkpoint(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {"steps": 60, "optimizer__lr": 1e9, "checkpoint_every": 1, "max_skipped": 3}
    done = launcher.run(lab.student(tmp_path, **settings))
    assert done.code == 2 and "Traceback" not in done.text
    assert len(done.errors) == 1 and "steps=4 of the last 100 left out" in done.errors[0]
    run = lab.run(tmp_path)
    step = len(run.losses) - 3
    assert all(loss is None for _, loss, _, _ in run.losses[step:])
    tensors, state = checkpoint.load(run.newest)
    assert state["step"] == step
    assert all(t.isfinite().all() for group in tensors.values() for t in group.values())


@pytest.mark.case("N1")
def test_a_gradient_that_is_not_finite_never_changes_the_weights(
    make_job: Any, tmp_path: Path
) -> None:
    class Steep(VelocityDistillation):
        def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
            return (student - student.detach()).square().sum().sqrt()  # 0, its slope 0 / 0

    job = make_job()
    student = job.student(0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    job.student = lambda seed: student
    with pytest.raises(Refusal, match=r"3 of the last 100 left out \(grad_norm=nan\)"):
        train(job, tmp_path, Steep(), max_skipped=2)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


@pytest.mark.case("F3")
def test_a_save_that_fails_is_tried_again_and_three_in_a_row_stop_the_run(
    make_job: Any, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, fails = checkpoint.save, [True, True, False, True, True, True]
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: None if fails.pop(0) else save(*a, **k))
    with pytest.raises(Refusal, match="free some space"):
        train(make_job(), tmp_path, steps=20, checkpoint_every=1)
    assert not fails and len(losses(lab, tmp_path)) == 6
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-3"


def test_a_last_save_that_fails_is_never_passed_over(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    with pytest.raises(Refusal, match="checkpoints"):
        train(make_job(), tmp_path, steps=2)


def test_a_run_goes_on_in_its_own_precision(make_job: Any) -> None:
    job = make_job(steps=1)
    train_stage(job)
    again = make_job(steps=2, resume="force")
    again.accelerator.state._mixed_precision = "bf16"
    try:
        with pytest.raises(Refusal, match="mixed_precision=bf16: allowed is no, in which"):
            train_stage(again)
    finally:
        again.accelerator.state._mixed_precision = "no"
    train_stage(again)


def test_a_finished_run_is_left_as_it_is(make_job: Any, lab: Any, tmp_path: Path) -> None:
    job = make_job()
    train(job, tmp_path)
    before = (lab.run(tmp_path, "").losses, lab.run(tmp_path, "").weights)
    assert train(job, tmp_path).step == 4
    assert (lab.run(tmp_path, "").losses, lab.run(tmp_path, "").weights) == before


def test_the_density_of_the_metrics_is_that_of_the_masks(make_job: Any, tmp_path: Path) -> None:
    progress = train(make_job(), tmp_path, steps=1)
    shares = [a.mask.selected.double().mean() for a in attentions(progress.student).values()]
    assert loop.mean_density(progress.student) == pytest.approx(float(torch.stack(shares).mean()))
    assert math.isclose(loop.mean_density(make_job().dense()), 1)


def test_the_metrics_tell_the_share_of_a_step_that_waits_for_data(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    quick = job.dataset("train")
    train(job, tmp_path / "quick", steps=2)

    class Slow:
        def __len__(self) -> int:
            return len(quick)

        def __getitem__(self, index: int) -> dict[str, Any]:
            time.sleep(0.25)  # 4 clips: a second a step
            return quick[index]

    monkeypatch.setattr(job, "dataset", lambda split: Slow())
    train(job, tmp_path / "slow", steps=2)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("quick", "slow")
    }
    for row in rows["quick"] + rows["slow"]:
        assert row["data_share"] == pytest.approx(row["data_seconds"] / row["step_seconds"])
    slow = rows["slow"][1]
    assert slow["data_seconds"] >= 1 and slow["data_share"] > 0.5  # sleeping waits, at any load
    assert rows["quick"][1]["data_seconds"] < 1


def test_a_run_killed_before_its_first_checkpoint_measures_step_0_once(
    make_job: Any, lab: Any, tmp_path: Path
) -> None:
    class Watching:
        every = 1

        def __call__(self, student: Any) -> dict[str, float]:
            return {"heldout_error": 0.5}

    folder = tmp_path / "killed"
    folder.mkdir()
    left = [{"step": step, "heldout_error": 0.7} for step in (0, 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in left))
    train(make_job(), folder, watch=Watching(), steps=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [(row["step"], row["heldout_error"]) for row in rows] == [(0, 0.5), (1, 0.5), (2, 0.5)]
