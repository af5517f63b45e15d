"""The benchmark of a training step, at a size that a CPU does at once."""

import json
import sys
from pathlib import Path

import pytest
import torch

from gossamer.benchmarks import memory, training_step
from gossamer.benchmarks.training_step import Marks, Row, markdown, measure

TINY = [
    "model.num_layers=2",
    "model.num_heads=2",
    "model.head_dim=16",
    "model.ffn_dim=32",
    "model.channels=4",
    "model.text_dim=8",
    "layout.q_block=16",
    "layout.kv_block=16",
    "policy.k=0.25",
    "sparsity=0.75",
]


def test_the_table_has_the_parts_of_all_three_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--commit", "abc", "--steps", "1"]
    size = ["--latent", "4x2x8x16", "--text", "4"]
    assert training_step.main([*out, *size, *TINY, "ema=0.9"]) == 0
    said = capsys.readouterr().out
    assert said == (tmp_path / "training_step.md").read_text()
    assert "64 tokens" in said and "commit abc" in said
    found = json.loads((tmp_path / "training_step.json").read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == list(training_step.VARIANTS)
    assert rows["dense fine-tuning"]["density"] == 1
    for name in ("sparse, frozen teacher", "sparse, cached velocities"):
        assert rows[name]["density"] == 0.25
        assert {"teacher", "forward", "backward", "optimizer", "average"} <= rows[name]["ms"].keys()
    assert "teacher" not in rows["dense fine-tuning"]["ms"]
    assert all(row["estimated"] > 0 and min(row["ms"].values()) >= 0 for row in rows.values())


def test_only_some_steps_are_timed(tmp_path: Path) -> None:
    size = ["--latent", "4x2x8x16", "--text", "4", "--steps", "1"]
    chosen = ["--out", str(tmp_path), "--only", "dense,cached"]
    assert training_step.main([*chosen, *size, *TINY]) == 0
    rows = json.loads((tmp_path / "training_step.json").read_text())["rows"]
    names = [row["variant"] for row in rows]
    assert names == ["dense fine-tuning", "sparse, cached velocities"]


def test_ratios_are_to_the_dense_step_and_memory_stands_beside_its_estimate() -> None:
    dense = Row("dense", 1.0, {"forward": 100, "backward": 200, "optimizer": 30}, 10 << 30, 9 << 30)
    parts = {"teacher": 90.0, "forward": 40.0, "backward": 60.0, "optimizer": 10.0}
    sparse = Row("sparse", 0.05, parts, 8 << 30, 8 << 30, kernels=[("a kernel", 1.5, 3)])
    failed = Row("large", 0.0, {}, 0, 99 << 30, reason="out of memory")
    said = markdown([dense, sparse, failed], {"device": "x", "command": "y"}, "title")
    assert (
        "| sparse | 0.050 | - | 90 | 40 | 60 | 10 | - | 200 | 3.00, 1.65 | 8.0 | 8.0 | +0.0% |"
        in said
    )
    assert "| 10.0 | 9.0 | -10.0% |" in said
    assert "| large | out of memory |" in said and "| `a kernel` | 1.50 | 3 |" in said


def test_without_a_dense_step_there_are_no_ratios_to_it() -> None:
    sparse = Row("sparse", 0.05, {"forward": 40.0, "backward": 60.0}, 0, 1 << 30)
    too_large = Row("dense", 0.0, {}, 0, 99 << 30, reason="out of memory")
    for rows in ([sparse], [too_large, sparse]):
        said = markdown(rows, {"device": "x", "command": "y"}, "title")
        assert "| sparse | 0.050 | - | - | 40 | 60 | - | - | 100 | - | 0.0 | 1.0 | - |" in said


def test_a_part_of_no_variants_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for benchmark in (training_step, memory):
        with pytest.raises(SystemExit):
            benchmark.main(["--out", str(tmp_path / "x"), "--only", "spars "])
        assert "only=spars : allowed is a part of dense fine-tuning, " in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_a_row() -> None:
    def make() -> training_step.Step:
        raise torch.OutOfMemoryError("Tried to allocate 99 GiB. More words")

    assert measure("large", make, 5, steps=1).reason == "Tried to allocate 99 GiB"


def test_spans_lie_between_marks() -> None:
    marks = Marks(torch.device("cpu"))
    marks._marks = [("start", 1.0), ("a", 1.5), ("b", 1.75), ("a", 2.0)]
    assert marks.take() == {"a": 750.0, "b": 250.0}
    assert marks.take() == {}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both models be tiny, and clips."""
    config = memory.config
    less = [s for s in TINY if not s.startswith(("layout", "model.text_dim", "model.channels"))]
    monkeypatch.setattr(memory, "config", lambda *more, shape: config(*less, *more, shape=shape))
    monkeypatch.setattr(memory, "LATENTS", {"480p": (16, 2, 8, 16)})


def test_every_step_that_is_measured_runs(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert memory.main(["--measure", "--out", str(tmp_path / "memory.md")]) == 0
    said = (tmp_path / "memory.md").read_text()
    assert all(f"| {row} | 0.0 | " in said for row in memory.MEASURED if "8-bit" not in row)
    assert "| sparse, 8-bit AdamW | optimizer=adamw_8bit: allowed is" in said


def test_the_plan_has_a_row_for_each_way(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = ("dense fine-tuning", "sparse, LoRA 64, shared teacher")
    monkeypatch.setattr(memory, "ROWS", {way: memory.ROWS[way] for way in ways})
    assert memory.main(["--out", str(tmp_path / "memory.md"), "--commit", "abc"]) == 0
    said = (tmp_path / "memory.md").read_text()
    assert "planned, not measured" in said
    for row in memory.ROWS:
        assert said.count(f"| {row} |") == 2  # of both models
