"""The arms of a study: read, chosen and merged; a study of three arms from start to results."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.train.arms import choose_arms, load_arms
from gossamer.train.config import compose
from gossamer.train.refusal import Refusal
from gossamer.train.study.record import Results
from gossamer.train.sweep import sweep
from gossamer.train.sweep_plan import plan, split

RECIPE = "# @package _global_\nstages: [calibrate, train, evaluate]\n"
ARMS = """
untrained: ["layout.block=[1,2,2]", "stages=[calibrate,evaluate]", seed=0]
trained: ["layout.block=[1,2,2]", compensation=gated_centroid]
start: ["layout.block=[1,2,2]", compensation=gated_centroid, "stages=[calibrate,evaluate]"]
dense: [sparsity=0.0, loss=flow_matching, evaluation.floor=true]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "arms.yaml").write_text(ARMS)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder / "tiny.yaml"


def jobs(*overrides: str) -> list[Any]:
    launch, swept, constant = split(overrides)
    return plan(swept, constant, launch.arms)[1]


def test_every_arm_of_the_study_composes_at_every_sparsity(tmp_path: Path) -> None:
    found = jobs(
        "recipe=study", "model.path=/teacher", "data.source=/film.mp4", "sweep.arms=all",
        "sparsity=0.8", "seed=2",
    )  # fmt: skip
    by_arm = {job.label.removeprefix("arm="): job.cfg for job in found}
    assert {arm for arm in by_arm if len(arm) == 1} == set("BCDEFGHIJKT")
    svg2, floor = by_arm["A-svg2"], by_arm["I"]
    assert svg2.sparsity == 0.8 and svg2.policy.k == pytest.approx(0.2)
    assert "train" not in svg2.stages and svg2.seed == 0 and floor.estimator.seed == floor.seed == 2
    assert by_arm["C"].allocation.k == 0.03
    assert "VelocityDistillation" in by_arm["C"].loss._target_
    assert "FlowMatching" in by_arm["B"].loss._target_


def test_an_arm_wins_over_the_sweep_and_comes_once_for_what_it_settles(recipe: Path) -> None:
    found = jobs(f"recipe={recipe}", "sweep.arms=[dense,untrained]", "sparsity=0.5", "seed=1,2")
    assert [job.label for job in found] == ["arm=dense,seed=1", "arm=untrained", "arm=dense,seed=2"]
    assert [job.cfg.sparsity for job in found] == [0.0, 0.5, 0.0]
    assert [job.cfg.seed for job in found] == [1, 0, 2]


def test_unknown_arms_and_recipes_without_arms_are_refused(recipe: Path) -> None:
    with pytest.raises(Refusal, match="did you mean dense"):
        choose_arms(load_arms(str(recipe)), "denes")
    with pytest.raises(Refusal, match=r"a recipe that has arms\.yaml"):
        load_arms("demo")
    (recipe.with_suffix("") / "arms.yaml").write_text("a: 3\n")
    with pytest.raises(Refusal, match=r"NAME: \[key=value"):
        load_arms(str(recipe))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["sweep.workers=-1"], "at least 0"),
        (["sweep.workers=2", "sweep.num_processes=2"], "0 with num_processes above 1"),
        (["sweep.velocities=here"], "none without workers"),
        (["sweep.time_limit=5"], "nothing without workers"),
        (["sweep.workers=1", "sweep.grace=0"], "seconds above 0"),
        (["sweep.results=found.json"], "ends in .jsonl"),
        (["sweep.keep_checkpoints=false"], "give results"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        sweep(["seed=0,1", *settings])
    assert said in str(refusal.value)


def test_jobs_are_known_whatever_they_are_called(tmp_path: Path) -> None:
    first = compose(["name=a", f"runs_dir={tmp_path}", "num_workers=2"])
    for same in ("name=b", "compile=true"):
        assert Results.identity(first) == Results.identity(compose([same]))
    others = [
        "stages=[calibrate,evaluate]",
        "seed=1",
        "evaluation.clips=9",
        "training_data.clips=3",
    ]
    assert len({Results.identity(compose([x])) for x in ["name=a", *others]}) == 5


@pytest.mark.multi
def test_a_study_runs_in_a_worker_and_a_second_call_has_nothing_to_do(
    lab: Any, recipe: Path, tmp_path: Path
) -> None:
    settings = {k: v for k, v in lab.student_settings.items() if k not in ("name", "stages")}
    del settings["layout.block"]
    settings |= {"steps": 2, "sparsity": 0.5, "evaluation.every": 1, "evaluation.every_clips": 1}
    results = tmp_path / "results" / "tiny.jsonl"
    overrides = [
        f"recipe={recipe}", *lab.overrides(tmp_path / "runs", settings), "sweep.arms=all",
        "sweep.workers=1", f"sweep.results={results}", "sweep.keep_checkpoints=false", "seed=0",
        "sweep.time_limit=300", f"sweep.velocities={tmp_path / 'velocities'}",
    ]  # fmt: skip
    assert sweep(overrides) == 0
    rows = {row["overrides"]["arm"]: row for row in map(json.loads, results.open())}
    assert set(rows) == {"untrained", "trained", "start", "dense"}
    untrained, trained, dense = rows["untrained"], rows["trained"], rows["dense"]
    assert untrained["velocity_error"]["before"] == untrained["velocity_error"]["after"]["0"]
    assert untrained["training"] == {} and not untrained["trained"]
    curve = trained["training"]["curve"]
    assert [step for step, _, _ in curve] == [0, 1, 2] and curve[0][1] == 0 < curve[1][1]
    assert len({clip["shot"] for clip in trained["clips"]}) == 2
    assert set(trained["quality"]["teacher/after"]) == {"psnr", "ssim", "temporal_psnr"}
    assert dense["velocity_error"]["after"].keys() == {"0"}, "how far it went from its start"
    assert "teacher/other_noise" in dense["quality"] and "real/teacher" in dense["quality"]
    floor = dense["floor"]["backends"]
    assert "math" in floor and max(max(clip) for clip in floor["math"]) < 1e-4
    assert trained["velocity_error"]["before"] == rows["start"]["velocity_error"]["before"]
    sweep_dir = tmp_path / "runs" / "tiny-sweep"
    logs = {file.parent.name: file.read_text() for file in sweep_dir.glob("*/log.txt")}
    shared = [job for job, log in logs.items() if "calibration taken from" in log]
    assert shared == ["arm=start"] and len(list((sweep_dir / "calibrations").iterdir())) == 2
    assert not list(sweep_dir.glob("*/checkpoints")) and (sweep_dir / "report").is_dir()
    assert len(list((tmp_path / "velocities").glob("*/*.safetensors"))) == 2, "one for each step"
    assert not (sweep_dir / "starts").exists(), "nothing is left to do"
    stamp = results.read_bytes()
    assert sweep(overrides) == 0
    assert results.read_bytes() == stamp
    summary = json.loads((sweep_dir / "summary.json").read_text())
    assert [job["status"] for job in summary] == ["skipped"] * 4
