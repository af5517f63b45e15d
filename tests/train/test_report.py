"""Reports of synthetic runs and sweeps hold the right numbers and need nothing but their file."""

import base64
import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.train.refusal import Refusal
from gossamer.train.report import headline, report, sweep_report
from gossamer.train.reporting import strips
from gossamer.train.reporting.errors import headline_section
from gossamer.train.reporting.run import Run
from gossamer.train.reporting.sections import masks
from gossamer.train.reporting.sweep import pareto_front

LEVELS = [0.9, 0.5, 0.1]
LAYERS = ["blocks.0.attn1", "blocks.1.attn1"]
BEFORE = [[0.30, 0.20, 0.10], [0.50, 0.40, 0.30]]
AFTER = {
    "0": [[0.20, 0.10, 0.05], [0.30, 0.20, 0.20]],
    "1": [[0.22, 0.12, 0.05], [0.32, 0.22, 0.18]],
    "10": [[0.18, 0.11, 0.06], [0.31, 0.21, 0.19]],
}
PER_HEAD = {"before": [[0.1, 0.2], [0.3, 0.4]], "after": [[0.15, 0.25], [0.35, 0.45]]}


def sparse_evaluation(**changes: Any) -> dict[str, Any]:
    complete = {
        "noise_levels": LEVELS,
        "clips": [{"index": 3, "clip_id": "meadow-0003"}, {"index": 8, "clip_id": "burrow-0008"}],
        "seeds": [0, 1, 10],
        "sparsity": {
            "requested": 0.875,
            "planned": 0.8712,
            "measured_before": 0.8691,
            "measured_after": 0.8634,
        },
        "velocity_error": {"before": BEFORE, "after": AFTER},
        "layers": LAYERS,
        "density": PER_HEAD,
        "recall": PER_HEAD,
        "samples": {
            "psnr_to_teacher": {"before": [15.25], "after": [24.75]},
            "files": ["samples/clip-0.npz"],
        },
        "device": "CPU, 2 threads",
        "seconds": 3.0,
    }
    return complete | changes


def dense_evaluation() -> dict[str, Any]:
    return {
        "noise_levels": LEVELS,
        "flow_matching_loss": {"train": [0.3, 0.2, 0.4], "heldout": [0.5, 0.3, 0.52]},
        "samples": {
            "psnr_to_real": [18.0],
            "repeat_first_psnr": [],
            "files": ["samples/clip-0.npz"],
        },
        "device": "CPU, 2 threads",
    }


def write_run(folder: Path, evaluation: dict[str, Any], *, repeats: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\nsparsity: 0.875\nprompt: <b>fox & hare</b>\n")
    write_metrics(folder)
    for seed in repeats:
        write_metrics(folder / "repeats" / f"seed-{seed}")
    write_json(folder / "evaluation" / "evaluation.json", evaluation)
    write_sample(folder / "evaluation" / "samples" / "clip-0.npz")
    (folder / "calibration").mkdir()
    (folder / "calibration" / "calibration.txt").write_text("head 0: k 0.1 <because>\n")
    write_json(
        folder / "calibration" / "calibration.json",
        {
            "layers": LAYERS,
            "num_heads": 2,
            "noise_levels": LEVELS,
            "target_density": 0.125,
            "planned_density": 0.1288,
            "k": [[0.1, 0.2], [0.05, 0.15]],
            "p": [[0.0, 0.2], [0.0, 0.0]],
            "captured_mass": np.linspace(0.2, 0.8, 12).reshape(2, 2, 3).tolist(),
            "curve_densities": [0.05, 0.1, 0.2],
            "curve_error": np.geomspace(0.04, 1e-4, 36).reshape(2, 2, 3, 3).tolist(),
            "measure": "velocity",
            "seconds": 2.0,
            "clips": 4,
        },
    )
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_metrics(folder: Path, steps: int = 70) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step,
            "loss": 1 / step,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "density": 0.13,
            "step_seconds": 0.25,
            "data_seconds": 0.01,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sample(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 200, 14)[:, None] + np.array([0, 20, 50])  # [W, 3]
    video = np.stack([np.tile(ramp + 5 * frame, (8, 1, 1)) for frame in range(7)]).astype(np.uint8)
    videos = dict.fromkeys(names or ("real", "teacher", "before", "after"), video)
    np.savez_compressed(path, caption=np.str_("a hare & a fox"), **videos)


class References(HTMLParser):
    """Collects everything a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [v or "" for name, v in attrs if name in ("src", "srcset", "href")]


def assert_self_contained(page: str) -> None:
    references = References()
    references.feed(page)
    assert references.found, "a report shows pictures"
    assert all(re.match(r"data:image/(png|gif);base64,[A-Za-z0-9+/]", r) for r in references.found)
    assert not {"script", "link", "iframe"} & set(references.tags)
    assert not re.search(r"https?:|//www|@import|url\(", page)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_headline_is_the_mean_over_clips_levels_and_seeds() -> None:
    figures = headline(sparse_evaluation())
    before = sum(sum(clip) for clip in BEFORE) / 6
    seeds = [sum(sum(clip) for clip in AFTER[seed]) / 6 for seed in ("0", "1", "10")]
    assert figures["error_before"] == pytest.approx(before)
    assert figures["error_after"] == pytest.approx(statistics.mean(seeds))
    assert figures["error_after_sd"] == pytest.approx(statistics.stdev(seeds))
    assert figures["reduction_percent"] == pytest.approx(
        100 * (before - statistics.mean(seeds)) / before
    )
    assert figures["measured_sparsity"] == 0.8634
    assert figures["clips_improved"] == 2
    assert json.loads(json.dumps(figures)) == figures


def test_the_headline_of_one_seed_has_no_spread() -> None:
    error = {"before": BEFORE, "after": {"0": AFTER["0"]}}
    figures = headline({"noise_levels": LEVELS, "velocity_error": error})
    assert figures["error_after"] == pytest.approx(1.05 / 6)
    assert figures["error_after_sd"] is None
    assert figures["reduction_percent_sd"] is None
    assert figures["requested_sparsity"] is None


def test_the_headline_of_a_dense_run_is_its_flow_matching_loss() -> None:
    figures = headline(dense_evaluation())
    assert figures["heldout_loss"] == pytest.approx(0.44)
    assert figures["train_loss"] == pytest.approx(0.3)
    assert figures["psnr_to_real"] == 18.0
    assert figures["repeat_first_psnr"] is None


def test_a_report_with_repeats_shows_every_section_and_the_right_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sparse_evaluation(), repeats=(1, 10))
    path = report(run)
    assert path == run / "report" / "index.html"
    page = text_of(path)
    assert_self_contained(page)
    seeds = [np.mean(AFTER[seed]) for seed in AFTER]
    cut = 100 * (1 - np.mean(seeds) / np.mean(BEFORE))
    at_low_noise = [clip[2] for matrix in AFTER.values() for clip in matrix]
    for expected in (
        f"{np.mean(BEFORE):.4f}",
        f"{np.mean(seeds):.4f} ± {statistics.stdev(map(float, seeds)):.4f} (over 3 seeds)",
        f"{cut:.1f} %",
        f"<td>{statistics.mean(at_low_noise):.4f} ± ",
        "<td>87.5 %</td>",
        "<td>87.1 %</td>",
        "<td>86.9 %</td>",
        "<td>86.3 %</td>",
        "136,600 of them are computed exactly and 863,400 are not",
        "2 of 2",
        "meadow-0003",
        "before 15.2 dB, after 24.8 dB",
        "a hare &amp; a fox",
        "prompt: &lt;b&gt;fox &amp; hare&lt;/b&gt;",
        "70 steps logged, 0.25 s a step",
        "CPU, 2 threads",
    ):
        assert expected in page, expected
    assert "is not in this run" not in page
    shown = re.findall(r"base64,([^\"]*)", page)
    for picture in (*run.glob("report/*.png"), *run.glob("report/*.gif")):
        assert base64.b64encode(picture.read_bytes()).decode() in shown, picture.name
    assert {p.name for p in run.glob("report/*.png") if "-dark" not in p.name} == {
        "error.png",
        "clips.png",
        "loss.png",
        "training.png",
        "budgets-k.png",
        "budgets-p.png",
        "density.png",
        "recall.png",
        "mass.png",
        "curves.png",
        "video-0.png",
    }


def test_hit_rates_of_codebooks_are_told_where_there_are_clusters(tmp_path: Path) -> None:
    rates = [[[0.5, 0.7], [0.9, 1.0]], [[0.25, 0.75], [0.8, 0.9]]]  # [layer][q, k][head]
    evaluation = sparse_evaluation(hit_rate={"before": rates, "after": []})
    page = report(write_run(tmp_path / "run", evaluation)).read_text()
    cells = re.findall(r"<tr><th scope=\"row\">before</th>(.*?)</tr>", page)
    assert "<td>q</td><td>55.0 %</td><td>25.0 %</td>" in cells
    assert "<td>k</td><td>90.0 %</td><td>80.0 %</td>" in cells
    without = write_run(tmp_path / "without", sparse_evaluation(hit_rate={"before": []}))
    (without / "report").mkdir()
    assert "Hit rate" in page and "Hit rate" not in str(masks(Run.read(without)))


def test_the_loss_has_one_line_a_seed_in_the_order_of_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sparse_evaluation(), repeats=(10, 2))
    assert list(Run.read(run).curves) == ["seed 0", "seed 2", "seed 10"]


def test_metrics_survive_a_row_cut_short_and_a_step_written_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sparse_evaluation())
    rows = '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"st'
    (run / "metrics.jsonl").write_text(rows)
    curves = Run.read(run).curves["seed 0"]
    assert curves["step"].tolist() == [1, 2]
    assert curves["loss"].tolist() == [9, 4]
    assert np.isnan(curves["lr"]).all()


def test_the_headline_section_of_one_seed_says_that_its_spread_is_unknown() -> None:
    error = {"before": BEFORE, "after": {"0": AFTER["0"]}}
    shown = headline_section(headline(sparse_evaluation(velocity_error=error)))
    assert "from one seed, so its spread is not known" in shown
    assert "nan" not in shown


def test_the_headline_section_says_when_the_change_is_within_the_spread() -> None:
    after = {"0": [[0.29, 0.2, 0.1], [0.5, 0.4, 0.3]], "1": [[0.33, 0.2, 0.1], [0.5, 0.4, 0.3]]}
    error = {"before": BEFORE, "after": after}
    shown = headline_section(headline(sparse_evaluation(velocity_error=error)))
    assert "not established" in shown
    assert "distillation raised" in shown
    assert "% higher" in shown


def test_a_report_leaves_out_what_the_run_does_not_have_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    error = {"before": BEFORE, "after": AFTER}
    write_json(
        run / "evaluation" / "evaluation.json", {"noise_levels": LEVELS, "velocity_error": error}
    )
    page = text_of(report(run))
    assert_self_contained(page)
    for sentence in (
        "metrics.jsonl is not in this run, so there is no loss plot.",
        "calibration/calibration.json is not in this run: no budgets.",
        "Measured density is not in evaluation.json.",
        "Captured attention mass is not in evaluation.json.",
        "calibration/calibration.json is not in this run: no error curves.",
        "calibration/calibration.txt is not in this run.",
        "No sampled videos are in this run.",
        "config.yaml is not in this run.",
    ):
        assert sentence in page, sentence
    assert {p.name for p in (run / "report").glob("*.png") if "-dark" not in p.name} == {
        "error.png",
        "clips.png",
    }


def test_a_report_drops_the_pictures_of_an_earlier_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_json(run / "evaluation" / "evaluation.json", dense_evaluation())
    (run / "report").mkdir()
    (run / "report" / "video-7.gif").write_bytes(b"old")
    (run / "report" / "notes.txt").write_text("mine")
    report(run)
    assert not (run / "report" / "video-7.gif").exists()
    assert (run / "report" / "error.png").exists()
    assert (run / "report" / "notes.txt").exists()


def test_a_dense_run_reports_its_losses_and_no_masks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dense_evaluation())
    write_sample(run / "evaluation" / "samples" / "clip-0.npz", "real", "teacher")
    page = text_of(report(run))
    assert_self_contained(page)
    for expected in ("0.4400", "0.3000", "+0.1400", "+0.2000", "18.00 dB PSNR"):
        assert expected in page, expected
    assert "Sparsity is the share" not in page
    assert "Masks" not in page
    assert "first frame repeated" not in page


def test_a_run_that_was_not_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="run `gossamer evaluate`"):
        report(tmp_path)
    with pytest.raises(Refusal, match="the folder of a run"):
        report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "evaluation.json"),
        ('{"noise_levels": [0.5]}', "velocity_error or flow_matching_loss"),
        (
            '{"noise_levels": [0.5], "velocity_error": {"before": [[1]], "after": {}}}',
            "one seed or more",
        ),
        (
            '{"noise_levels": [1, 0], "velocity_error": {"before": [[1]], "after": {"0": [[1]]}}}',
            "noise levels",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    write_json(tmp_path / "evaluation" / "evaluation.json", {})
    (tmp_path / "evaluation" / "evaluation.json").write_text(content)
    with pytest.raises(Refusal, match=re.escape(message)):
        report(tmp_path)


def test_a_moving_picture_shrinks_until_it_fits_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "clip.npz")
    sample = strips.Sample.read(tmp_path / "clip.npz")
    assert list(sample.videos) == ["real", "teacher", "before", "after"]
    full = strips.write_moving(sample, tmp_path / "full.gif")
    assert full is not None
    monkeypatch.setattr(strips, "MOVING_BYTES", full.stat().st_size - 1)
    smaller = strips.write_moving(sample, tmp_path / "smaller.gif")
    assert smaller is not None
    assert smaller.stat().st_size < full.stat().st_size
    monkeypatch.setattr(strips, "MOVING_BYTES", 100)
    assert strips.write_moving(sample, tmp_path / "none.gif") is None
    assert not (tmp_path / "none.gif").exists()


def test_the_pareto_front_holds_what_no_other_job_beats_in_both() -> None:
    sparsity = np.array([0.75, 0.9, 0.9, 0.8, 0.95, 0.7])
    error = np.array([0.10, 0.20, 0.25, 0.21, 0.40, 0.10])
    beaten = {
        i
        for i in range(6)
        for j in range(6)
        if j != i
        and sparsity[j] >= sparsity[i]
        and error[j] <= error[i]
        and (sparsity[j], error[j]) != (sparsity[i], error[i])
    }
    assert pareto_front(sparsity, error) == sorted(set(range(6)) - beaten, key=lambda i: error[i])


def write_sweep(folder: Path) -> Path:
    metrics = [headline(sparse_evaluation()) | {"measured_sparsity": s} for s in (0.8, 0.9)]
    jobs = [
        {
            "overrides": {"recipe": "demo", "sparsity": sparsity},
            "status": status,
            "seconds": seconds,
            "metrics": figures,
            "run_dir": f"sparsity={sparsity},a",
            "error": "",
        }
        for sparsity, status, seconds, figures in zip(
            (0.8, 0.9), ("finished", "skipped"), (90.0, 0.0), metrics, strict=True
        )
    ]
    jobs.append(
        {
            "overrides": {"recipe": "demo", "sparsity": 1.5},
            "status": "failed",
            "seconds": 1200.0,
            "metrics": {},
            "run_dir": "sparsity=1.5",
            "error": "sparsity=1.5: allowed is <1",
        }
    )
    write_json(folder / "summary.json", jobs)
    (folder / "sparsity=0.8,a" / "report").mkdir(parents=True)
    (folder / "sparsity=0.8,a" / "report" / "index.html").write_text("the report")
    return folder


def test_a_sweep_report_lists_every_job_and_draws_the_front(tmp_path: Path) -> None:
    path = sweep_report(write_sweep(tmp_path / "sweep"))
    page = text_of(path)
    assert (path.parent / "pareto.png").exists()
    after = statistics.mean(float(np.mean(matrix)) for matrix in AFTER.values())
    for expected in (
        "Jobs: 2 of 3 finished",
        '<th scope="col">sparsity</th>',
        f"<td>{after:.4f} ± ",
        "<td>80.0 %</td>",
        "<td>90 s</td>",
        "<td>20 min</td>",
        "#3 failed: sparsity=1.5: allowed is &lt;1",
    ):
        assert expected in page, expected
    assert '<th scope="col">recipe</th>' not in page, "all jobs have the same recipe"
    assert not re.search(r"https?:", page)


def test_a_sweep_report_links_the_reports_that_exist(tmp_path: Path) -> None:
    path = sweep_report(write_sweep(tmp_path / "sweep"))
    references = References()
    references.feed(text_of(path))
    links = [link for link in references.found if not link.startswith("data:")]
    assert links == ["../sparsity%3D0.8%2Ca/report/index.html"]


def test_a_sweep_without_a_finished_job_has_a_table_and_no_plot(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    jobs = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", jobs[2:])
    page = text_of(sweep_report(folder))
    assert "there is no plot" in page
    assert "Jobs: 0 of 1 finished" in page


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="run `gossamer sweep` first"):
        sweep_report(tmp_path)


def test_the_headline_needs_no_plotting_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    assert headline(sparse_evaluation())["num_seeds"] == 3
