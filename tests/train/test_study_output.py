"""What studies leave: where it was measured, the table, and a plot."""

import argparse
import subprocess
from pathlib import Path

import pytest
import torch

from gossamer.train import study_output
from gossamer.train.study_output import (
    Line,
    add_output,
    draw_bars,
    draw_lines,
    environment,
    heading,
    leave,
)

PNG = b"\x89PNG"


def test_the_commit_is_git_s_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment("c", "given")["commit"] == "given"
    monkeypatch.setattr(study_output, "__file__", str(tmp_path / "train" / "study_output.py"))
    assert environment("c", "")["commit"] == "unknown"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(command, check=True)
    assert len(environment("c", "")["commit"]) == 7


def test_the_heading_says_device_versions_commit_date_and_command() -> None:
    said = heading(environment("python -m study --x 1", "abc1234", "cpu"))
    assert said.startswith(f"device cpu, torch {torch.__version__}, triton ")
    assert ", commit abc1234, date 20" in said and said.endswith("`python -m study --x 1`.")


def test_table_and_plot_are_left_where_asked_and_nowhere_else(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_output(parser)
    header = environment("c", "abc", "cpu")
    panels = {"p": {"a": Line([1, 2], [0.1, 0.2], spread=([0.1, 0.1], [0.2, 0.3]))}}
    table = ["| x |", "|---|", "| 1 |"]

    def left(*arguments: str) -> set[str]:
        leave(parser.parse_args(arguments), "T", header, table, panels, x="x", y="y")
        return {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}

    assert left() == set()
    out = tmp_path / "results" / "study.md"
    assert left("--out", str(out)) == {"results/study.md", "results/study.png"}
    assert out.read_text() == f"# T\n\n{heading(header)}\n\n| x |\n|---|\n| 1 |\n"
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert "docs/a.png" in left("--out", str(out), "--plot", str(tmp_path / "docs" / "a.png"))


def test_lines_and_bars_hold_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(study_output, "_save", lambda figure, path: drawn.append(figure))
    panels = {"left": {"a": Line([1, 2], [3, 4], colour="k", style="--")}, "right": {}}
    draw_lines(tmp_path / "a.png", panels, x="x", y="y")
    draw_bars(tmp_path / "b.png", {"one": {"u": 1.0, "w": 2.0}, "two": {"u": 3.0, "w": 4.0}}, x="x")
    left, right = drawn[0].axes
    assert left.get_title() == "left" and not right.lines
    assert left.lines[0].get_ydata().tolist() == [3, 4] and left.lines[0].get_linestyle() == "--"
    bars = [(p.get_x(), p.get_width()) for p in drawn[1].axes[0].patches]
    assert bars == [(0, 1), (0, 3), (1, 2), (3, 4)]
