"""The attention mass of a dense model, against a softmax by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.sparse.attach import attentions, method_from_spec
from gossamer.sparse.layout import permute_qkv
from gossamer.train.evaluate import velocities
from gossamer.train.samples import evenly, noisy_samples
from gossamer.train.study.__main__ import main
from gossamer.train.study.mass import best_mass, mass_curves


def test_the_best_blocks_of_a_row_by_hand() -> None:
    mass = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25]])[None, None]
    assert best_mass(mass, (0.01, 0.25, 0.5, 1.0)).tolist() == [
        pytest.approx([0.425, 0.425, 0.7, 1.0])
    ]


def test_curves_are_the_mass_of_the_models_own_attention(make_job: Any) -> None:
    job = make_job()
    found = mass_curves(job, 1, (0.1, 1.0))
    teacher, dataset = job.dense(), job.dataset("heldout")
    levels = list(job.cfg.evaluation.noise_levels)
    (clip,) = evenly(len(dataset), 1)
    samples = noisy_samples([dataset[clip]], levels, 1, job.device)
    calls: list[Any] = []
    first = next(iter(attentions(teacher).values()))
    first.register_forward_pre_hook(lambda _, args: calls.append(args))
    velocities(teacher, samples, "")
    q, k, v, grid, _ = calls[0]
    assert found.shape == (2, len(levels), q.shape[1], 2)
    torch.testing.assert_close(found[..., 1], torch.ones_like(found[..., 1]))
    q_layout, kv_layout = method_from_spec(job.method_spec).layout(q, k, v, grid)
    q, k, _ = permute_qkv(q_layout, kv_layout, q, k, v)
    weights = (q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    parts = weights.split(kv_layout.offsets.diff().tolist(), -1)
    mass = torch.stack([part.sum(-1) for part in parts], -1)  # [B, H, S, Nk]
    rows = torch.stack([p.mean(2) for p in mass.split(q_layout.offsets.diff().tolist(), 2)], 2)
    torch.testing.assert_close(found[0, 0], best_mass(rows, (0.1, 1.0)), rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_table(lab: Any, tmp_path: Path) -> None:
    page = tmp_path / "mass.md"
    assert main(["mass", str(page), *lab.student(tmp_path), "--clips", "1"]) == 0
    lines = page.read_text().splitlines()
    assert lines[0].startswith("| noise level | 3 %: q25 / median / q75 |")
    assert any(line.startswith("| all | ") for line in lines)
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 0", "| 1"]
