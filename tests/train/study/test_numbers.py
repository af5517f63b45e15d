"""The numbers of a study from made-up results whose truth is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.train.refusal import Refusal
from gossamer.train.study.__main__ import main
from gossamer.train.study.data import Cell, Study
from gossamer.train.study.expectations import steps_to, verdicts
from gossamer.train.study.record import Results
from gossamer.train.study.statistics import bootstrap, difference, mean, ratio


def status(found: Sequence[Any], *words: str) -> str:
    matching = [v.status for v in found if all(word in v.expected for word in words)]
    assert len(matching) == 1, words
    return str(matching[0])


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    chance, covered = np.random.default_rng(1), 0
    shots = [str(i // 2) for i in range(40)]
    for _ in range(100):
        of_shot = chance.normal(size=20).repeat(2)
        table = 5 + of_shot[None] + 0.1 * chance.normal(size=(1, 40))
        found = bootstrap([table], shots, mean, draws=200)
        covered += found.low <= 5 <= found.high
    assert 85 <= covered <= 99  # clips taken as independent cover about 82


def test_pairing_by_clip_removes_the_spread_of_clips() -> None:
    clips = np.linspace(1, 3, 20)[None]
    table, other = clips.repeat(3, 0), 0.9 * clips.repeat(3, 0)
    shots = [str(i) for i in range(20)]
    found = bootstrap([other, table], shots, ratio)
    assert (found.low, found.value, found.high) == pytest.approx((0.9, 0.9, 0.9))
    alone = bootstrap([table], shots, mean)
    assert alone.high - alone.low > 0.3
    again = bootstrap([other, table], shots, difference)
    assert again == bootstrap([other, table], shots, difference)


def test_a_curve_reaches_an_error_at_its_first_step_below() -> None:
    curve = np.array([[0, 0, 0.3], [10, 1, 0.2], [20, 2, 0.25], [30, 3, 0.1]])
    assert steps_to(curve, 0.2) == (10, 1) and steps_to(curve, 0.3) == (0, 0)
    assert steps_to(curve, 0.05) is None


def test_verdicts_follow_the_figures(study: Any) -> None:
    good = verdicts(study(C=0.18, F=0.09, D=0.13, E=0.12, G=0.15, H=0.2, B_few=0.2, C_few=0.15))
    for words in (
        ("F's final",), ("95 %, E is better than D",), ("95 %, D is better than H",),
        ("90 %, C-few is better than B-few",), ("the best arm",), ("95 %, every arm trained is",),
        ("95 %, every arm trained on mismatched",),
    ):  # fmt: skip
        assert status(good, *words) == "held", words
    assert status(good, "F reaches C's final") == "did not hold", "at step 10 of 100"
    other = verdicts(study(C=0.18, C_other=0.29))  # 0.97 of its start
    assert status(other, "95 %, every arm trained is") == "held"
    assert status(other, "95 %, every arm trained on mismatched") == "did not hold"
    bad = verdicts(study(C=0.18, F=0.15, D=0.13, E=0.14, G=0.12, I=0.29))
    for words in (("F's final",), ("95 %, E is better than D",), ("95 %, every arm trained is",)):
        assert status(bad, *words) == "did not hold", words
    assert status(bad, "95 %, D is better than H") == "not measured"
    close = study(D=0.13, E=0.1305)
    assert status(verdicts(close), "95 %, E is better than D") != "held"
    for seed, row in enumerate(close.cells["E", 0.95].rows):
        of_d = close.cells["D", 0.95].rows[seed]
        row["velocity_error"].update(of_d["velocity_error"])
    close = Study(dict(close.cells) | {("E", 0.95): Cell("E", 0.95, close.cells["E", 0.95].rows)})
    assert status(verdicts(close), "95 %, E is better than D") == "did not hold", "they are equal"


def test_a_start_below_the_goal_needs_no_step(line: Any) -> None:
    lines = [line("C", 0.95, 0, error=0.18), line("F", 0.95, 0, error=0.1, start=0.15)]
    found = [v for v in verdicts(Study.of(lines)) if "F reaches" in v.expected]
    assert found[0].status == "held" and "at step 0 of 100" in found[0].found


def test_times_are_of_jobs_that_had_their_device_alone(line: Any) -> None:
    crowded = {"sharing": 2, "forward_seconds": {"student": 0.9, "teacher": 0.9}}
    rows = [line("C", 0.95, 0, error=0.2), line("C", 0.95, 1, error=0.1, **crowded)]
    rows[1]["training"] = {**rows[1]["training"], "step_seconds": 9.0}
    rows[1]["training"]["curve"] = [[s, 9 * t, e] for s, t, e in rows[1]["training"]["curve"]]
    found = Cell("C", 0.95, rows)
    assert (found.speedup, found.step_seconds) == pytest.approx((1.5, 0.1))
    assert found.milliseconds("student") == pytest.approx(20)
    assert found.curve is not None and found.after is not None
    assert found.curve[-1, 1:] == pytest.approx([10, 0.15])  # the error is of both
    assert len(found.after) == 2
    none = Cell("C", 0.95, rows[1:])
    assert (none.speedup, none.step_seconds, none.milliseconds("student")) == (None, None, None)
    text = [v for v in verdicts(Study.of([*rows[1:], line("F", 0.95, 0, error=0.05)]))
            if "F reaches" in v.expected]  # fmt: skip
    assert "GPU-seconds" not in text[0].found and "of the steps" in text[0].found


def test_the_page_holds_the_tables_and_the_plot(
    tmp_path: Path, line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "study.jsonl", tmp_path / "docs" / "numbers.md"
    lines = [
        line(arm, s, seed, error=error)
        for arm, error in (("C", 0.18), ("F", 0.09), ("A-svg2", 0.3))
        for s in (0.9, 0.95) for seed in (0, 1)
    ]  # fmt: skip
    lines.append(line("J", 0.0, 0, error=0.05))
    floor = {"backends": {"math": [[0.002] * 3] * 8}}
    lines.append(line("T", 0.0, 0, error=0.0, floor=floor))
    lines[0]["sparsity"]["measured_after"] = 0.893  # of two seeds: 0.35 points off
    results.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"torn')
    assert main(["numbers", str(results), str(page)]) == 0
    text = page.read_text()
    assert capsys.readouterr().out.strip() == str(page)
    for expected in (
        "8 of 6 shots", "F / C = 0.5", "attention backend math: velocity error | 0.002",
        "J, dense fine-tuning: velocity error", "10.35 % (more than",
        "At 95 %, by noise level:", "| 1.50 |", "![error against sparsity and speed]",
        "A-svg2: SVG2, untrained", "**held** — At 95 %, F's final error",
    ):  # fmt: skip
        assert expected in text, expected
    assert (page.parent / "numbers_pareto.png").stat().st_size > 5_000


def test_results_of_other_clips_and_missing_results_are_refused(
    tmp_path: Path, line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refusal, match="the same noise_levels"):
        Study.of([line("C", 0.9, 0, error=1), line("C", 0.9, 1, error=1, noise_levels=[0.5])])
    assert main(["numbers", str(tmp_path / "none.jsonl"), str(tmp_path / "n.md")]) == 2
    assert "run the study first" in capsys.readouterr().err
    assert Results(tmp_path / "none.jsonl").lines == []
