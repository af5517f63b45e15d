"""The study of re-clustering: what it counts, on the tiny teacher."""

from pathlib import Path
from typing import Any

import pytest

from gossamer.train.recluster_study import main


def test_every_step_clusters_all_and_an_endless_growth_only_the_first(
    lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--steps", "4", "--keep", "1e9", "--clusters", "4", "8", "--sparsity", "0.5"]
    out = tmp_path / "study.md"
    assert main([*lab.student(tmp_path), *flags, "--out", str(out)]) == 0
    head, _, every, first = (printed := capsys.readouterr().out).splitlines()
    assert out.read_text().endswith(printed) and "--keep 1e9" in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert head == "| steps | cluster again | clusterings | mean error | last error |"
    assert every.startswith("| 4 | every step | 100% | ")
    assert first.startswith("| 4 | growth 1e+09 | 25% | ")
    errors = [float(row.split(" | ")[3]) for row in (every, first)]
    assert all(0 < error < 1 for error in errors) and errors[0] != errors[1]
