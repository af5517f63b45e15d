"""Compiled blocks: eager losses, few variants, and never eager code instead without a word."""

import gc
import json
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils as dynamo
from torch import nn

from gossamer.train import model as models
from gossamer.train.check import preflight
from gossamer.train.compiling import compiling, no_silent_fallback
from gossamer.train.evaluation import EVALUATION, evaluate_stage
from gossamer.train.model import blocks_of, velocity
from gossamer.train.refusal import Refusal
from gossamer.train.stages import train_stage

LORA = {"lora__rank": 4, "lora__alpha": 16.0}
SHORT = {"steps": 3, "gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace as Inductor would, but generate no code."""
    own, backend = nn.Module.compile, getattr(request, "param", "eager")

    def compile_quickly(module: nn.Module, **options: Any) -> None:
        assert options == {"options": models.INDUCTOR}
        own(module, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    torch._dynamo.reset()
    dynamo.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def variants() -> Counter[Any]:
    """Return how often each function was traced."""
    found = ((m.co_filename, m.co_firstlineno, m.co_name) for m in dynamo.get_compilation_metrics())
    return Counter(one for one in found if one[0] is not None)


def trained(make_job: Any, name: str, **settings: Any) -> np.ndarray:
    """Train in this process; return losses, gradient norms and held-out errors of all seeds."""
    job = make_job(**{**SHORT, "name": name, **settings})
    train_stage(job)
    files = [job.seed_dir(seed) / "metrics.jsonl" for seed in job.seeds]
    rows = [json.loads(line) for file in files for line in file.open()]
    names = ("loss", "grad_norm", "heldout_error")
    return np.array([row[name] for row in rows for name in names if name in row])


@pytest.mark.parametrize("quick", ["aot_eager"], indirect=True)  # gradients as well
@pytest.mark.parametrize(
    ("teacher", "guidance"), [("frozen", 3.0), pytest.param("shared", 1.0, marks=pytest.mark.full)]
)
def test_compiled_student_and_teacher_train_as_eager_ones(
    teacher: str, guidance: float, make_job: Any
) -> None:
    settings = {"teacher": teacher, **LORA, "guidance__scale": guidance}
    eager = trained(make_job, "eager", **settings)
    assert not variants()
    compiled = trained(make_job, "compiled", compile=True, **settings)
    np.testing.assert_allclose(compiled, eager, rtol=1e-5)
    assert max(variants().values()) <= 4  # adapters, gradients: each on and off


def test_a_frozen_teacher_is_compiled_where_the_run_says_so(make_job: Any) -> None:
    for compiled in (False, True):
        teacher = make_job(compile=compiled).teacher()
        blocks = blocks_of(teacher.model)
        assert len(blocks) == 2
        assert all((b._compiled_call_impl is not None) is compiled for b in blocks)
    offloaded = make_job(compile=True, teacher="offloaded").teacher()
    assert all(b._compiled_call_impl is None for b in blocks_of(offloaded.model))


def test_a_second_seed_and_a_second_method_compile_nothing_new(make_job: Any) -> None:
    watched = {"evaluation__every": 1, "evaluation__every_clips": 1}
    trained(make_job, "one", compile=True, **watched)
    once = variants()
    assert max(once.values()) <= 4  # the watch is without gradients
    others = {"repeat_seeds": [1], "compensation": "drop", "steps": 4}
    both = trained(make_job, "two", compile=True, **watched, **others)
    assert variants() == once
    eager = trained(make_job, "eager", **watched, **others)
    np.testing.assert_allclose(both, eager, rtol=1e-5)


@pytest.mark.parametrize("seeds", [[], pytest.param([1], marks=pytest.mark.full)])
def test_a_compiled_evaluation_finds_what_an_eager_one_does(
    seeds: list[int], make_job: Any
) -> None:
    settings = {**SHORT, "name": "run", "steps": 1, "repeat_seeds": seeds}
    found = []
    for is_compiled in (False, True):
        job = make_job(compile=is_compiled, **settings)
        train_stage(job)  # the second time there is nothing to do
        path = job.run_dir / EVALUATION
        path.unlink(missing_ok=True)
        evaluate_stage(job)
        assert bool(variants()) is is_compiled
        found.append(json.loads(path.read_text()))
    for key, part in product(("velocity_error", "heldout_loss", "recall"), ("before", "after")):
        eager, compiled = (one[key][part] for one in found)
        if isinstance(eager, dict):  # of each seed
            eager, compiled = list(eager.values()), list(compiled.values())
        np.testing.assert_allclose(compiled, eager, rtol=1e-4)
    assert max(variants().values()) <= 4


@pytest.mark.full
def test_a_job_of_another_model_starts_anew_and_holds_nothing_of_the_last(make_job: Any) -> None:
    kept: dict[Any, Any] = {}

    def run(**settings: Any) -> list[Any]:
        job = make_job(compile=True, **settings)
        job.kept = kept
        with compiling(job):
            student, teacher = job.student(0), job.teacher()
            models.compile_blocks(student)
            clip = job.dataset("train")[0]
            call = [clip[name][None] for name in ("latent", "text", "condition")]
            with torch.no_grad():
                velocity(teacher.model, call[0], torch.ones(1), *call[1:])
            velocity(student, call[0], torch.ones(1), *call[1:]).square().mean().backward()
            return [weakref.ref(p) for m in (student, teacher.model) for p in m.parameters()]

    def alive(held: list[Any]) -> int:
        gc.collect()
        return sum(one() is not None for one in held)

    held = run()
    once = variants()
    assert not alive(held) and once
    assert not alive(run(compensation="drop", sparsity=0.6)) and variants() == once
    run(**LORA)  # other layers: all of it again, from nothing
    assert min(variants()[name] for name in once) == 2 * min(once.values())


def test_the_variant_after_the_last_is_refused_not_run_eagerly() -> None:
    def double(x: torch.Tensor, kind: str) -> torch.Tensor:
        return 2 * x if kind else x

    compiled = torch.compile(double, backend="eager")
    x = torch.ones(2)
    with no_silent_fallback(2):
        for kind in "ab":
            assert torch.equal(compiled(x, kind), 2 * x)
    with pytest.raises(Refusal, match="needs more than 2 variants"), no_silent_fallback(2):
        compiled(x, "c")
    with no_silent_fallback():
        assert torch.equal(compiled(x, "d"), 2 * x)
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize("tuned", [False, True])
def test_tuning_is_for_student_and_teacher_or_for_none(
    tuned: bool, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block, options: given.append(options))
    train_stage(make_job(compile=True, compile_tuned=tuned, steps=1))
    assert len(given) == 2 * make_job().source.skeleton().config.num_layers
    expected = models.INDUCTOR | (models.TUNED if tuned else {})
    assert all(options == expected for options in given)


def test_tuning_without_compiled_code_is_refused(make_job: Any) -> None:
    with pytest.raises(Refusal, match="compile_tuned=true: allowed is false where compile is"):
        preflight(make_job(compile_tuned=True).cfg, ["train"])


def test_a_run_that_is_not_compiled_changes_no_setting(make_job: Any) -> None:
    job = make_job()
    job.kept = {}
    with compiling(job):
        assert not torch._dynamo.config.fail_on_recompile_limit_hit
    assert job.kept == {}
