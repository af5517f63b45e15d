"""The four ways to hold a teacher give one loss curve; guidance and the negative prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.sparse.attach import attending_densely, attentions
from gossamer.sparse.attention import DenseAttention, SparseAttention
from gossamer.train import loop
from gossamer.train.config import build
from gossamer.train.data.dataset import collate
from gossamer.train.distiller import Distiller
from gossamer.train.draws import Draws
from gossamer.train.lora import adapters_off
from gossamer.train.losses import VelocityDistillation
from gossamer.train.model import velocity
from gossamer.train.noise import Uniform
from gossamer.train.pipeline import euler_sample
from gossamer.train.teach import write_cache
from gossamer.train.teacher import Guided
from gossamer.train.trackers import NoTracker
from gossamer.train.velocities import ROUNDING, VelocityCache

STEPS = 6
LORA = {"lora__rank": 4, "lora__alpha": 16.0, "noise_draws": 2}
GUIDED = {"guidance__scale": 3.0, "guidance__negative_prompt": "blurred grey noise"}


class Recorded(VelocityDistillation):
    """Keeps the root mean square of the target of each step."""

    def __init__(self) -> None:
        object.__setattr__(self, "rms", [])

    def __call__(self, student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
        assert teacher is not None
        self.rms.append(float(teacher.square().mean().sqrt()))  # type: ignore[attr-defined]
        return super().__call__(student, teacher, target)


def curve(job: Any, folder: Path, lab: Any) -> tuple[np.ndarray, np.ndarray]:
    """Train for some steps; return the loss of each and the RMS of each target."""
    loss = Recorded()
    distiller = Distiller(job.student(0), job.teacher(), loss, job.draws(0))
    settings = loop.TrainSettings(steps=STEPS, batch_size=4, lr=1e-3, warmup=1)
    loop.train(
        distiller,
        job.dataset("train"),
        job.accelerator,
        settings,
        folder=folder,
        tracker=NoTracker(),
    )
    losses = np.array(lab.run(folder.parent, folder.name).losses)
    return losses[:, 1], np.array(loss.rms)  # type: ignore[attr-defined]


@pytest.fixture(params=[{}, GUIDED], ids=["plain", "guided"])
def curves(
    request: Any, make_job: Callable[..., Any], lab: Any, tmp_path: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same training with each teacher."""
    found = {}
    for kind in ("frozen", "shared", "offloaded", "cached"):
        settings = {"teacher": kind, **LORA, **request.param}
        if kind == "cached":
            settings["teacher__path"] = tmp_path / "velocities"
            write_cache(make_job(**settings), tmp_path / "velocities")
        found[kind] = curve(make_job(**settings), tmp_path / kind, lab)
    return found


def test_all_four_teachers_give_the_same_loss_curve(curves: Any) -> None:
    frozen, rms = curves["frozen"]
    assert len(set(frozen)) == STEPS and (frozen > 0).all()
    for kind in ("shared", "offloaded"):
        np.testing.assert_array_equal(curves[kind][0], frozen)
    # bf16 keeps 8 significant bits, so |v' - v| <= u |v| with u = 2^-8 for each element, and by the
    # triangle inequality |sqrt(loss') - sqrt(loss)| <= u rms(v) for the same student. That is so at
    # the first step; later ones add what rounded targets did to the weights, and still hold here,
    # because roundings of either sign add up to little.
    cached = curves["cached"][0]
    off = np.abs(np.sqrt(cached) - np.sqrt(frozen))
    assert (off > 0).all() and (off <= ROUNDING * rms).all()


def batch_of(job: Any, clips: list[int]) -> dict[str, Tensor]:
    dataset = job.dataset("train")
    batch = collate([dataset[clip] for clip in clips])
    return {**batch, "position": torch.arange(len(clips))}


def test_the_shared_teacher_leaves_the_student_as_it_was(make_job: Any) -> None:
    job = make_job(teacher="shared", **LORA)
    student, teacher = job.student(0), job.teacher()
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # so that the adapters do something
    noised = job.draws(0)(batch_of(job, [0, 5]))
    call = (noised.x, noised.t, noised.text, noised.condition)
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    modules = dict(student.named_modules())
    with torch.no_grad():
        before = velocity(student, *call)
        target = teacher.velocity(student, noised)
        after = velocity(student, *call)
        dense = velocity(job.dense(), *call)
    assert torch.equal(target, dense) and not torch.allclose(before, dense, rtol=1e-2)
    assert torch.equal(before, after)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trainable
    assert dict(student.named_modules()) == modules
    assert all(isinstance(a, SparseAttention) for a in attentions(student).values())


def test_the_shared_teacher_holds_no_weights_of_its_own(make_job: Any) -> None:
    job = make_job(teacher="shared", **LORA)
    teacher = job.teacher()
    assert not [v for v in vars(teacher).values() if isinstance(v, torch.nn.Module | Tensor)]
    kept = {k: v for k, v in vars(job).items() if isinstance(v, torch.nn.Module)}
    assert not [k for k, v in kept.items() if hasattr(v, "patch_embedding")]


def test_an_error_inside_brings_adapters_and_attention_back(make_job: Any) -> None:
    student = make_job(**LORA).student(0)
    with pytest.raises(KeyError), adapters_off(student), attending_densely(student):
        layer = student.blocks[0].attn1
        assert layer.to_q.disable_adapters
        assert isinstance(layer.processor.attention, DenseAttention)
        raise KeyError
    assert not layer.to_q.disable_adapters
    assert layer.processor.attention is attentions(student)["blocks.0.attn1"]


def test_the_cached_teacher_needs_no_model_after_the_start(make_job: Any, tmp_path: Path) -> None:
    job = make_job(teacher="cached", teacher__path=tmp_path, **LORA)
    write_cache(job, tmp_path)
    teacher = job.teacher()
    assert isinstance(teacher.cache, VelocityCache)
    assert not [v for v in vars(teacher).values() if isinstance(v, torch.nn.Module)]
    noised = job.draws(0)(batch_of(job, [3, 1]))
    live = velocity(job.dense(), noised.x, noised.t, noised.text, noised.condition)
    difference = (teacher.velocity(torch.nn.Identity(), noised) - live).abs()
    assert (difference <= ROUNDING * live.abs() + 1e-6).all()


@pytest.mark.parametrize("kind", ["frozen", "offloaded"])
def test_a_teacher_is_no_part_of_the_distiller(make_job: Any, kind: str) -> None:
    job = make_job(teacher=kind)
    student = job.student(0)
    distiller = Distiller(student, job.teacher(), build(job.cfg.loss), job.draws(0))
    assert len(list(distiller.parameters())) == len(list(student.parameters()))


def test_a_guided_model_is_the_formula_of_its_two_velocities(make_job: Any) -> None:
    job = make_job(**GUIDED)
    model, dense = job.guided(job.dense()), job.dense()
    assert isinstance(model, Guided)
    noised = job.draws(0)(batch_of(job, [0, 4, 7]))
    x, t, text, condition = noised.x, noised.t, noised.text, noised.condition
    negative = job.text.encode(["blurred grey noise"]).bfloat16().float().expand_as(text)
    with torch.no_grad():
        found = velocity(model, x, t, text, condition)
        own = velocity(dense, x, t, text, condition).double()
        other = velocity(dense, x, t, negative, condition).double()
    torch.testing.assert_close(found.double(), -2 * other + 3 * own, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own, other, rtol=1e-3)  # the prompts do differ


def test_a_guided_model_is_sampled_with_its_own_velocity(make_job: Any) -> None:
    job = make_job(**GUIDED)
    model = job.guided(job.dense())
    noised = job.draws(0)(batch_of(job, [0, 4]))
    rest = noised.text, noised.condition
    with torch.no_grad():
        expected = noised.x - velocity(model, noised.x, torch.ones(2), *rest)
    torch.testing.assert_close(euler_sample(model, noised.x, *rest, steps=1), expected)


def test_without_guidance_the_model_is_the_dense_one(make_job: Any) -> None:
    job = make_job()
    dense = job.dense()
    assert job.guided(dense) is dense


def batch(clips: int, positions: Any) -> dict[str, Tensor]:
    return {
        "latent": torch.arange(clips, dtype=torch.float)
        .view(-1, 1, 1, 1, 1)
        .expand(-1, 1, 2, 2, 2),
        "text": torch.ones(clips, 3, 2),
        "index": torch.arange(clips),
        "position": torch.as_tensor(positions),
    }


def test_the_share_of_negative_prompts_is_that_of_the_config() -> None:
    negative = torch.full((3, 2), -1.0)
    many, share = 2000, 0.3
    draws = Draws(levels=Uniform(), negative=negative, negative_share=share)
    noised = draws(batch(many, range(many)))
    chosen = (noised.text == -1).flatten(1).all(1)
    assert ((noised.text == 1).flatten(1).all(1) ^ chosen).all()
    sd = (share * (1 - share) / many) ** 0.5
    assert abs(float(chosen.double().mean()) - share) < 4 * sd
    alone = draws(batch(1, [17]))
    assert bool((alone.text == -1).all()) == bool(chosen[17])  # of the position alone
    assert abs(float(noised.t[chosen].mean()) - 0.5) < 4 * 0.29 / (many * share) ** 0.5


def test_without_a_share_no_prompt_changes() -> None:
    draws = Draws(levels=Uniform(), negative=torch.zeros(3, 2))
    assert (draws(batch(50, range(50))).text == 1).all()


def test_fixed_draws_come_in_turn_and_are_the_same_in_every_run() -> None:
    clips, count = 5, 3
    first = Draws(levels=Uniform(), seed=0, count=count, clips=clips)
    other = Draws(levels=Uniform(), seed=9, count=count, clips=clips)
    by_epoch = []
    for epoch in range(2 * count):
        positions = torch.arange(epoch * clips, (epoch + 1) * clips)
        noised = first(batch(clips, positions))
        assert noised.draw == [epoch % count] * clips
        assert torch.equal(noised.velocity, other(batch(clips, positions)).velocity)
        by_epoch.append(noised.t)
    for epoch in range(count):
        assert torch.equal(by_epoch[epoch], by_epoch[epoch + count])
    assert len(torch.stack(by_epoch).unique()) == clips * count


def test_endless_draws_are_those_of_seed_and_position() -> None:
    from gossamer.train.noise import add_noise, sample_noise

    data = batch(4, [10, 11, 12, 13])
    t, noise = sample_noise(Uniform(), data["latent"], [(6, p) for p in (10, 11, 12, 13)])
    noised = Draws(levels=Uniform(), seed=6)(data)
    assert torch.equal(noised.t, t) and torch.equal(noised.velocity, noise - data["latent"])
    assert torch.equal(noised.x, add_noise(data["latent"], noise, t))


@pytest.mark.gpu
def test_an_offloaded_teacher_leaves_its_blocks_on_the_cpu(make_job: Any) -> None:
    job = make_job(device="cuda", teacher="offloaded")
    teacher = job.teacher()
    noised = job.draws(0)({n: v.cuda() for n, v in batch_of(job, [0, 1]).items()})
    with torch.no_grad():
        for _ in range(3):  # the first pass finds the order that later ones fetch ahead in
            target = teacher.velocity(torch.nn.Identity(), noised)
    where = {p.device.type for p in teacher.model.blocks.parameters()}
    assert where == {"cpu"}
    dense = velocity(job.dense(), noised.x, noised.t, noised.text, noised.condition)
    assert torch.equal(target, dense)
