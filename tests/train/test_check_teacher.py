"""Teacher, loss, adapters and draws that do not fit each other are refused before any work."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from gossamer.train.check import preflight
from gossamer.train.config import compose, data_dir
from gossamer.train.data.shards import Manifest
from gossamer.train.refusal import Refusal

PARAMETERS = 5_244_224
ADAPTERS = 5 * 4 * 16 * (256 + 256)  # five layers, q, k, v and o of 256 x 256, rank 16

SCRATCH = ["model=scratch_wan", "model.channels=16", "model.condition=first_frame"]


def demo(tmp_path: Path, *overrides: str) -> DictConfig:
    paths = [f"data.dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "device=cpu"]
    return compose(["recipe=demo", *paths, *overrides])


def facts(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    return preflight(demo(tmp_path, *overrides), ["encode", "train"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher=shared"], "teacher=shared: allowed is frozen, offloaded or cached"),
        (["teacher=cached"], "noise_draws=0: allowed is 1 or more with teacher=cached"),
        (
            ["teacher=offloaded", "loss=flow_matching"],
            "teacher=offloaded: allowed is frozen with loss=flow_matching",
        ),
        (
            ["guidance.scale=3", "loss=flow_matching"],
            "guidance.scale=3: allowed is 1 with loss=flow_matching",
        ),
        (["export.lora=adapter"], "export.lora=adapter: allowed is merged where all weights train"),
        (
            ["export.lora=adapter", "lora.rank=4", *SCRATCH],
            "merged where the model has no folder",
        ),
        (["lora.rank=-1"], "lora.rank=-1: allowed is a whole number of at least 0"),
        (["lora.alpha=0"], "lora.alpha=0"),
        (["lora.layers=all"], "lora.layers=all: allowed is attention, linear"),
        (["guidance.negative_share=1.2"], "guidance.negative_share=1.2"),
        (["guidance.scale=inf"], "guidance.scale=inf: allowed is a finite number"),
        (["noise_draws=-1"], "noise_draws=-1"),
        (["teacher=cached", "teacher.check=-1"], "teacher.check=-1"),
        (["teacher=frosen"], "did you mean frozen?"),
        (["teacher=frozen", "teacher.pin=true"], "teacher.pin=True"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as error:
        cfg = demo(tmp_path, *overrides)
        preflight(cfg, list(cfg.stages))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_training_from_a_cache_that_is_not_there_is_refused(tmp_path: Path) -> None:
    cfg = demo(tmp_path, "teacher=cached", "noise_draws=4", f"teacher.path={tmp_path}/none")
    folder = data_dir(cfg)
    folder.mkdir(parents=True)
    request = {n: cfg.data[n] for n in ("frames", "height", "width", "condition")}
    Manifest(
        request=request,
        codec={"fingerprint": "x", "channels": 16, "compression": [2, 4, 4]},
        text={"fingerprint": "y", "length": 16, "dim": 64},
        sources=[],
        shards=[],
        splits={"train": 2},
    ).save(folder)
    with pytest.raises(Refusal, match="run `gossamer encode` with the same settings first"):
        preflight(cfg, ["train"])


def test_the_facts_say_how_the_teacher_is_held_and_what_trains(tmp_path: Path) -> None:
    whole = facts(tmp_path)
    assert (whole["teacher"], whole["trained"]) == ("frozen", PARAMETERS)
    shared = facts(tmp_path, "teacher=shared", "lora.rank=16")
    assert (shared["teacher"], shared["trained"]) == ("shared", ADAPTERS)
    assert shared["checkpoint"].startswith(f"{ADAPTERS * 12 / 1e9:.2f} GB each")
    cached = facts(tmp_path, "teacher=cached", "noise_draws=4", "teacher.path=there")
    size = 4 * 2 * 16 * 6 * 20 * 32 / 1e6  # bf16
    assert cached["teacher"] == f"4 velocities a clip, {size:.3g} MB, in there"
    assert "teacher" not in facts(tmp_path, "loss=flow_matching")
