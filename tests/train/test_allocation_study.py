"""The study of published methods: one line each, at the density asked for, on a stock model."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_wan

from gossamer.sparse.methods import NAMES
from gossamer.train.allocation_study import TITLE, _lines, _published, _table, main
from gossamer.train.evaluate import velocities
from gossamer.train.measures import Sample

diffusers = pytest.importorskip("diffusers")


def test_every_method_is_measured_and_the_model_is_left_as_it_was() -> None:
    model = tiny_wan(num_layers=1)
    x = torch.randn(1, 4, 4, 16, 16)
    sample = Sample(0, x, torch.tensor([0.5]), torch.randn(1, 7, 16), None, x)
    target = velocities(model, [sample], "teacher")
    options = argparse.Namespace(sparsity=[0.0, 0.75], block=[16, 8], arms=NAMES, methods=True)
    found = list(_published(model, [sample], target, options))
    assert [(name, s) for name, s, *_ in found] == [(n, s) for n in NAMES for s in (0.0, 0.75)]
    for _, sparsity, error, density in found:
        assert abs(density - (1 - sparsity)) < 0.02
        assert error < 1e-5 if sparsity == 0 else error > 1e-4
    assert torch.equal(velocities(model, [sample], "again")[0], target[0])
    table = _table({(n, s): [(e, d)] for n, s, e, d in found}, options)
    assert table[0].startswith("| method |") and len(table) == 2 + len(NAMES)


def test_the_study_leaves_its_table_and_a_plot(
    lab: Any, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study.md"
    flags = ["--sparsity", "0.5", "0.75", "--repeats", "2", "--arms", "uniform", "error"]
    assert main([*lab.student(tmp_path), *flags, "--out", str(out), "--commit", "abc"]) == 0
    text = out.read_text()
    printed, said = capsys.readouterr()
    assert said.count("uniform at 0.5:") == 1 and said.count("error at 0.5:") == 2
    assert text.startswith(f"# {TITLE}\n") and text.endswith(printed)
    assert "commit abc, date 20" in text and "--repeats 2 --arms uniform error" in text
    uniform, error = (printed.splitlines()[i].split(" | ") for i in (2, 3))
    assert uniform[0] == "| uniform" and error[0] == "| error"
    for cell in (uniform[1], uniform[3], error[1], error[3]):
        mean, low, high = (float(x.strip("()")) for x in cell.replace("to ", "").split())
        assert 0 < low <= mean <= high < 1
    assert float(uniform[2]) == pytest.approx(0.5, abs=0.02)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_lines_of_the_plot_are_means_and_ranges() -> None:
    found = {("a", 0.8): [(0.1, 0.2), (0.3, 0.2)], ("a", 0.9): [(0.5, 0.1), (0.5, 0.1)]}
    options = argparse.Namespace(arms=["a"], sparsity=[0.8, 0.9])
    line = next(iter(_lines(found, options).values()))["a"]
    assert line.x == [0.8, 0.9] and line.y == pytest.approx([0.2, 0.5])
    assert line.spread[0] == pytest.approx([0.1, 0.5])
    assert line.spread[1] == pytest.approx([0.3, 0.5])


def test_bad_input_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=demo", "data.frames=-1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: data.frames=-1: allowed is")
