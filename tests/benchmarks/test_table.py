"""The table: one line a row, ratios to dense attention of the same run, a reason for each gap."""

import json

import pytest

from gossamer.benchmarks.cases import SHAPES, Case, Shape
from gossamer.benchmarks.run import Row
from gossamer.benchmarks.table import (
    against_uniform,
    as_json,
    markdown,
    ratios,
)
from gossamer.benchmarks.timing import Timing

HEADER = {"device": "H100", "torch": "2.11", "commit": "abc", "command": "gossamer bench shape=A"}
A, B = SHAPES["A"], SHAPES["B"]


def timing(median: float) -> Timing:
    return Timing(median, median * 0.99, median * 1.02, 9, 3 << 29, 0.25)


def dense(name: str, forward: float, backward: float | str, shape: Shape = A) -> Row:
    phases: dict[str, Timing | str] = {"forward": timing(forward)}
    phases["backward"] = backward if isinstance(backward, str) else timing(backward)
    return Row(shape, None, name, True, 1.0, {}, phases)


def sparse(rows: str, forward: float, density: float = 0.05) -> Row:
    phases: dict[str, Timing | str] = {
        "forward": timing(forward),
        "backward": "no stock kernel | here",
        "mask": timing(0.2),
        "total": "no stock kernel | here",
    }
    return Row(A, Case((128, 64), 0.95, rows), "flex", False, density, {"out": 0.034}, phases)


ROWS = [
    dense("dense-cudnn", 10.0, 30.0),
    dense("dense-flash", 8.0, "wrong: dq off by 1.0e+00"),
    dense("dense-cudnn", 40.0, 100.0, B),
    sparse("uniform", 0.8),
    sparse("skewed", 1.0, density=0.06),
]


def test_ratios_are_to_dense_attention_of_the_same_shape() -> None:
    assert ratios(ROWS[3], ROWS, only_cudnn=True) == pytest.approx(
        {"forward": 10 / 0.8, "forward + mask": 10.0}
    )
    assert ratios(ROWS[3], ROWS, only_cudnn=False) == pytest.approx(
        {"forward": 8 / 0.8, "forward + mask": 8.0}
    )
    assert ratios(ROWS[0], ROWS, only_cudnn=False) == pytest.approx(
        {"forward": 0.8, "backward": 1.0}
    )
    assert ratios(ROWS[3], ROWS[3:], only_cudnn=True) == {}


def test_skewed_rows_are_compared_by_rate() -> None:
    assert against_uniform(ROWS[4], ROWS) == pytest.approx({"forward": 0.06 / 0.05 * 0.8})
    assert against_uniform(ROWS[3], ROWS) == {}


def test_the_table_has_one_line_a_row_and_names_its_origin() -> None:
    text = markdown([*ROWS[3:], *ROWS[:3]], HEADER, "5 of 9 rows in 12 s.")
    assert "device H100, torch 2.11, commit abc. Command: `gossamer bench shape=A`." in text
    assert "5 of 9 rows in 12 s." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[4] for line in lines[1:]] == [
        "dense-cudnn",
        "dense-flash",
        "flex",
        "flex",
        "dense-cudnn",
    ]
    uniform = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert uniform[:5] == ["A", "128x64", "95%", "uniform", "flex"]
    assert uniform[5] == "0.800 (0.792-0.816)" and uniform[7] == "-"
    assert float(uniform[6]) == pytest.approx(4 * 128 * 12 * 32760**2 * 0.05 / 0.8e9, abs=1)
    assert uniform[11:13] == ["12.50 10.00 - - -", "10.00 8.00 - - -"]
    assert uniform[14:16] == ["0.25 - 0.25", "1.50 -"]
    assert uniform[16] == "backward, total: no stock kernel / here; error of out 3.4%"
    assert lines[2].split(" | ")[-1] == "backward: wrong: dq off by 1.0e+00 |"


def test_the_json_has_every_figure() -> None:
    written = json.loads(as_json(ROWS, HEADER, "done"))
    assert written["device"] == "H100" and written["progress"] == "done"
    last = written["rows"][3]
    assert last["shape"] == {"name": "A", "heads": 12, "tokens": 32760, "head_dim": 128}
    assert last["case"] == {"block": [128, 64], "sparsity": 0.95, "rows": "skewed"}
    assert last["phases"]["forward"]["median_ms"] == 1.0
    assert last["phases"]["forward"]["peak_bytes"] == 3 << 29
    assert last["phases"]["backward"] == {"not_timed": "no stock kernel | here"}
    assert last["errors"] == {"out": 0.034}
