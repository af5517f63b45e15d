"""q, k and v for the study of estimators are those of a run's dense model."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gossamer.benchmarks.tensors import LEVELS, captured
from gossamer.sparse.attach import attentions
from gossamer.sparse.layout import TokenGrid
from gossamer.train.evaluate import velocities
from gossamer.train.samples import evenly, noisy_samples


def test_attention_of_what_is_captured_is_the_models_own(
    lab: Any, make_job: Any, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    found = list(captured(cpu, lab.student(tmp_path), layers=1))
    job = make_job()
    teacher, dataset = job.dense(), job.dataset("heldout")
    layers = attentions(teacher)
    assert [x.group for x in found] == [f"t={t}" for t in LEVELS for _ in layers]
    outputs: list[torch.Tensor] = []
    for module in layers.values():
        module.register_forward_hook(lambda module, args, out: outputs.append(out))
    (clip,) = evenly(len(dataset), 1)
    velocities(teacher, noisy_samples([dataset[clip]], list(LEVELS), 1, cpu), "teacher")
    for problem, out in zip(found, outputs, strict=True):
        assert isinstance(problem.grid, TokenGrid) and problem.q.shape[2] == problem.grid.num_tokens
        again = F.scaled_dot_product_attention(problem.q, problem.k, problem.v)
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
    few = list(captured(cpu, lab.student(tmp_path), every=2, layers=2))
    assert [x.group for x in few] == [f"t={t}" for t in LEVELS for _ in range(0, len(layers), 2)]
    assert torch.equal(few[0].k, found[0].k[:, ::2])
