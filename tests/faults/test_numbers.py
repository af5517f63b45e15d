"""NaN, jumps of the loss and chance never reach the weights unseen."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.sparse.attach import attentions
from gossamer.train import health, loop
from gossamer.train.distiller import Distiller
from gossamer.train.files import sha256
from gossamer.train.health import Health, where_not_finite
from gossamer.train.losses import VelocityDistillation
from gossamer.train.refusal import Refusal
from gossamer.train.trackers import NoTracker

BITS = ("model", "optimizer", "ema")


class Disturbed(VelocityDistillation):
    """The usual loss, times a factor at some of its calls (counted from 1)."""

    def __init__(self, factors: dict[int, float]) -> None:
        super().__init__()
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "calls", iter(range(1, 10**9)))

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        loss = super().__call__(student, teacher, target)
        is_step = torch.is_grad_enabled()  # and no second look at a bad step
        return loss * self.factors.get(next(self.calls), 1) if is_step else loss


def train(job: Any, folder: Path, loss: Any = None, **settings: Any) -> loop.Progress:
    """Train the job's student for a few steps in this process."""
    values = {"steps": 6, "batch_size": 4, "lr": 1e-3, "warmup": 2, "ema": 0.9, **settings}
    return loop.train(
        Distiller(job.student(0), job.teacher(), loss or VelocityDistillation(), job.draws(0)),
        job.dataset("train"),
        job.accelerator,
        loop.TrainSettings(**values),
        folder=folder,
        tracker=NoTracker(),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def assert_left_out(job: Any, folder: Path, bad: float) -> None:
    """Train with a bad last step, and require the bits of the checkpoint before it."""
    train(job, folder, Disturbed({6: bad}), checkpoint_every=5)
    before, after = (folder / "checkpoints" / f"step-{step}" for step in (5, 6))
    for name in BITS:
        assert sha256(before / f"{name}.safetensors") == sha256(after / f"{name}.safetensors")
    assert [row["skipped"] for row in rows(folder)] == [0] * 5 + [1]


@pytest.mark.case("N1")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit_and_its_clips_are_named(
    bad: float, make_job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job()
    assert_left_out(job, tmp_path, bad)
    assert f"step 6 is left out in all processes: loss={bad} (process 0, clips " in caplog.text
    assert job.dataset("train").meta(0)["clip_id"] in caplog.text


@pytest.mark.case("N1", control=True)
def test_a_step_that_is_counted_all_the_same_is_noticed(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Health, "judge", lambda self, step, measured: "")
    with pytest.raises(Refusal, match="NaN or infinity"):  # the checkpoint's own last line
        assert_left_out(make_job(), tmp_path / "nan", math.nan)
    monkeypatch.setattr(loop.checkpoint, "_first_not_finite", lambda tensors: None)
    with pytest.raises(AssertionError):
        assert_left_out(make_job(), tmp_path, math.nan)


@pytest.mark.case("N1")
def test_a_run_with_left_out_steps_resumes_bit_for_bit_and_counts_them(
    make_job: Any, tmp_path: Path
) -> None:
    bad = {2: math.nan, 3: math.inf, 5: math.nan}
    train(make_job(), tmp_path / "whole", Disturbed(bad))
    first = Disturbed({**bad, 5: 1.0})
    object.__setattr__(first, "calls", iter([1, 2, 3, 4]))  # ends in the middle
    with pytest.raises((StopIteration, RuntimeError)):
        train(make_job(), tmp_path / "parts", first, checkpoint_every=2)
    # the save due after step 2, which was left out, came after step 4
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-4"]
    train(make_job(), tmp_path / "parts", Disturbed({1: math.nan}))
    whole, parts = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row["skipped"] for row in whole] == [0, 1, 2, 2, 3, 3]
    for name in ("loss", "grad_norm", "skipped", "lr"):
        assert [row[name] for row in parts] == [row[name] for row in whole]


@pytest.mark.case("N1")
def test_more_than_the_allowed_number_stops_and_keeps_the_checkpoint_before(
    make_job: Any, tmp_path: Path
) -> None:
    bad = Disturbed(dict.fromkeys(range(4, 9), math.nan))
    with pytest.raises(Refusal, match=r"steps=3 of the last 100 left out .*max_skipped=2"):
        train(make_job(), tmp_path, bad, steps=20, checkpoint_every=1, max_skipped=2)
    steps = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"step-2", "step-3"}


def test_old_left_out_steps_are_forgotten_after_a_hundred() -> None:
    judge = Health(2, 10.0, False)
    for step in (1, 2):
        judge.judge(step, {"loss": math.nan})
    for step in range(3, 101):
        judge.judge(step, {"loss": 1.0})
    assert judge.skipped == 2
    judge.judge(101, {"loss": 1.0})
    assert judge.skipped == 1 and not judge.is_failing


SPOILED = {
    "q": lambda q, k, v: (q * math.nan, k, v),
    "k": lambda q, k, v: (q, k * math.inf, v),
    "v": lambda q, k, v: (q, k, v * math.nan),
}


def batch_of(job: Any) -> dict[str, Tensor]:
    from gossamer.train.data.dataset import collate

    batch = collate([job.dataset("train")[0]])
    return {**batch, "position": torch.arange(1)}


@pytest.mark.case("N2")
@pytest.mark.parametrize("name", SPOILED)
def test_nan_in_q_k_or_v_is_traced_to_its_layer(
    name: str, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    distiller = Distiller(job.student(0), job.teacher(), VelocityDistillation(), job.draws(0))
    layer, attention = list(attentions(distiller.student).items())[1]
    spoil = SPOILED[name]
    attention.register_forward_pre_hook(lambda module, args: (*spoil(*args[:3]), *args[3:]))
    assert where_not_finite(distiller, batch_of(job)) == f"{name} of {layer}"


@pytest.mark.case("N2")
def test_nan_in_batch_teacher_layer_or_gradient_is_traced(make_job: Any) -> None:
    job = make_job()
    teacher = job.teacher()
    distiller = Distiller(job.student(0), teacher, VelocityDistillation(), job.draws(0))
    batch, student = batch_of(job), distiller.student
    assert where_not_finite(distiller, batch) == ""
    found = where_not_finite(distiller, {**batch, "latent": batch["latent"] * math.nan})
    assert found == "latent of the batch"

    student.proj_out.bias.grad = torch.full_like(student.proj_out.bias, math.nan)
    assert where_not_finite(distiller, batch) == "gradient of proj_out.bias"

    hook = student.blocks[1].ffn.register_forward_hook(lambda m, args, out: out * math.inf)
    assert where_not_finite(distiller, batch).startswith("output of blocks.1.ffn")
    hook.remove()

    velocity = teacher.velocity
    teacher.velocity = lambda *args: velocity(*args) * math.nan
    assert where_not_finite(distiller, batch) == "velocity of the teacher"


@pytest.fixture
def spiked(make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that trains 8 steps, the 7th with 10,000 times its loss."""
    monkeypatch.setattr(health, "FEWEST", 4)

    def spiked(name: str, **settings: Any) -> list[dict[str, Any]]:
        train(make_job(), tmp_path / name, Disturbed({7: 1e4}), steps=8, **settings)
        return rows(tmp_path / name)

    return spiked


@pytest.mark.case("N3")
def test_a_jump_of_the_loss_is_logged_with_its_clips_and_left_out_if_asked(
    spiked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert spiked("counted")[-1]["skipped"] == 0
    assert "step 7 is counted: loss=" in caplog.text and "clips film.mp4@" in caplog.text
    assert "over 10 times the median" in caplog.text
    assert caplog.text.count(" is counted: ") == 1
    assert spiked("skipped", skip_spikes=True)[-1]["skipped"] == 1
    assert "step 7 is left out in all processes: loss=" in caplog.text


@pytest.mark.case("N3", control=True)
def test_without_a_limit_no_jump_is_logged(spiked: Any, caplog: pytest.LogCaptureFixture) -> None:
    spiked("unlimited", loss_spike=math.inf)
    assert "times the median" not in caplog.text


@pytest.mark.case("N4")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_losses_stay_finite_in_each_precision(
    precision: str, rounds: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    steps = 10 * len(list(rounds(1, 20)))
    env = {"ACCELERATE_MIXED_PRECISION": precision}
    done = launcher.run(lab.student(tmp_path, steps=steps), env=env)
    assert done.code == 0, done.text
    found = rows(tmp_path / "student")
    assert len(found) == steps and all(math.isfinite(row["loss"]) for row in found)
    assert {row["skipped"] for row in found} == {0}


def same_twice(job: Any, folder: Path, steps: int, **second: Any) -> None:
    train(job, folder / "one", steps=steps)
    train(job, folder / "two", steps=steps, **second)
    one, two = (folder / name / "checkpoints" / f"step-{steps}" for name in ("one", "two"))
    for name in BITS:
        assert sha256(one / f"{name}.safetensors") == sha256(two / f"{name}.safetensors")


@pytest.mark.case("N6")
def test_two_runs_of_a_seed_have_the_same_bits(rounds: Any, make_job: Any, tmp_path: Path) -> None:
    same_twice(make_job(), tmp_path, 5 * len(list(rounds(1, 20))))


@pytest.mark.case("N6", control=True)
def test_runs_of_two_seeds_differ(make_job: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        same_twice(make_job(), tmp_path, 2, seed=1)


@pytest.mark.case("N10")
def test_keys_and_mask_permuted_together_change_nothing(rounds: Any) -> None:
    for seed in rounds(5, 50):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, 1, 2, 32, 16, generator=generator, dtype=torch.float64).unbind()
        selected = torch.rand(1, 2, 4, 4, generator=generator) < 0.5
        offsets = torch.arange(0, 33, 8)
        order = torch.randperm(4, generator=generator)
        tokens = (order[:, None] * 8 + torch.arange(8)).flatten()
        plain = Blocks.from_selected(selected, offsets, offsets, 8, 8)
        moved = Blocks.from_selected(selected[..., order], offsets, offsets, 8, 8)
        out = block_sparse_attention(q, k, v, plain)[0]
        permuted = block_sparse_attention(q, k[:, :, tokens], v[:, :, tokens], moved)[0]
        torch.testing.assert_close(permuted, out, rtol=1e-12, atol=1e-12)
        if not selected.all():  # the control: the mask must move too
            wrong = block_sparse_attention(q, k[:, :, tokens], v[:, :, tokens], plain)[0]
            assert not torch.allclose(wrong, out, rtol=1e-3) or (order == torch.arange(4)).all()
