"""What `gossamer check` finds out before anything heavy starts."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from gossamer.train.check import check, check_device, preflight
from gossamer.train.config import compose, data_dir
from gossamer.train.data.shards import Manifest, Shard
from gossamer.train.refusal import Refusal


def demo(tmp_path: Path, *overrides: str) -> DictConfig:
    return compose([f"data.dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", *overrides])


def refusal(cfg: DictConfig, *stages: str) -> str:
    with pytest.raises(Refusal) as error:
        preflight(cfg, list(stages or cfg.stages))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_manifest(cfg: DictConfig, **changes: Any) -> None:
    """Write what a finished encode of the config leaves, but for the shards."""
    request = {n: cfg.data[n] for n in ("frames", "height", "width", "condition")}
    values: dict[str, Any] = {
        "codec": {"fingerprint": "x", "channels": 16, "compression": [2, 4, 4]},
        "text": {"fingerprint": "y", "length": 16, "dim": 64},
        "splits": {"heldout": 1, "train": 2},
    }
    folder = data_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [Shard("train-00000.parquet", "", 2, "train")]
    Manifest(request=request, sources=[], shards=shards, **{**values, **changes}).save(folder)


def test_the_facts_of_the_demo_are_those_of_its_configs(tmp_path: Path) -> None:
    facts = check(demo(tmp_path, "device=cpu", "recipe=demo"))
    assert facts["device"] == torch.device("cpu")
    assert (facts["tokens"], facts["grid"]) == (6 * 10 * 16, "6 x 10 x 16")
    assert facts["parameters"] == 5_244_224
    assert facts["attention"] == "5 layers of 8 heads, 32 wide"
    assert facts["blocks"] == "60 x 60 of 16 x 16"
    assert facts["backend"] == "reference" and facts["precision"] == "float32"
    assert facts["checkpoint"].startswith(f"{5_244_224 * 12 / 1e9:.2f} GB each, up to 3 at once")
    latents = 2 * 2 * 16 * 6 * 20 * 32 / 1e6  # with the condition, in bf16
    assert facts["clip"].startswith(f"{latents:.3g} MB of latents")


def test_a_dense_run_has_no_mask_to_check(tmp_path: Path) -> None:
    facts = preflight(demo(tmp_path, "recipe=demo", "sparsity=0.0"), ["encode", "train"])
    assert "blocks" not in facts and facts["tokens"] == 960


def test_a_report_alone_needs_nothing_but_a_device(tmp_path: Path) -> None:
    cfg = demo(tmp_path, "model=pretrained", f"model.path={tmp_path}/nowhere")
    assert preflight(cfg, ["report"]).keys() == {"device"}


@pytest.mark.case("C6")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(Refusal, match="device=cuda: allowed is cpu or auto"):
        check_device("cuda")
    assert check_device("auto") == torch.device("cpu")


TOKENS = "policy=error_budget", "policy.unit=tokens", "estimator=error_aware"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["codec.channels=24", "codec.path=null"], "codec.channels=24: allowed is a codec"),
        (["text.dim=32"], "text.dim=32: allowed is 64"),
        (["data.condition=none"], "data.condition=none: allowed is first_frame"),
        (["data.frames=13"], "frames=13: allowed is a multiple of 2"),
        (["data.height=84"], "data.height=21 latents"),
        (["data.width=520"], "data.width=65 tokens: allowed is at most the model's 64"),
        (["sparsity=0.99"], "sparsity=0.99: allowed is at most 0.9833 (1 of 60 blocks a row"),
        (["sparsity=0.95", "allocation=fixed"], "at most 0.9000 (6 of 60 blocks"),
        (["allocation=one_mass", "sparsity=null", "error_budget=0.1"], "null with allocation"),
        (["allocation=one_mass", *TOKENS], "policy.unit=tokens: allowed is blocks"),
        (
            ["compensation=filtered_drop"],
            "compensation=filtered_drop: allowed is another one where",
        ),
        (
            ["estimator=head_pattern"],
            "estimator=HeadPattern: allowed is one that the other parts fit",
        ),
        (["policy=error_budget"], "policy.scope=row: allowed is an estimator that gives mass"),
        (
            ["layout=semantic_clusters", "layout.num_q=961", "policy=token_hybrid"],
            "layout=SemanticClusters: allowed is one that fits 960 tokens; num_q=961",
        ),
        (["layout=sorted_clusters", "layout.num_kv=961"], "num_kv=961: allowed is at most the 960"),
        (
            ["layout=row_major", "layout.q_block=3000000000"],
            "q_block=3000000000: allowed is",
        ),
        (["data.source=nowhere.mp4"], "data.source=nowhere.mp4"),
        (["data.holdout=0"], "data.holdout=0: allowed is above 0"),
        (["batch_size=2", "grad_accumulation=3"], "batch_size=2: allowed is a multiple of 3"),
        (["backend=hopper"], "for backend 'hopper'; use backend='triton' or 'auto'"),
    ],
)
def test_a_run_that_cannot_work_is_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    assert said in refusal(demo(tmp_path, "recipe=demo", *overrides))


def test_the_batch_must_divide_over_the_processes_that_accelerate_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 processes" in refusal(demo(tmp_path, "recipe=demo", "batch_size=6"))


def test_triton_is_refused_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    said = refusal(demo(tmp_path, "recipe=demo", "backend=triton"))
    assert "not installed" in said and "pip install" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs bf16 kernels")
def test_bf16_kernels_are_refused_on_a_cpu_and_the_reference_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert preflight(demo(tmp_path, "recipe=demo"), ["encode"])["precision"] == "bfloat16"
    said = refusal(demo(tmp_path, "recipe=demo", "backend=triton"))
    assert "backend=triton" in said and "bfloat16" in said


def test_training_without_encoded_data_is_refused(tmp_path: Path) -> None:
    assert "run gossamer encode first" in refusal(demo(tmp_path, "recipe=demo"), "train")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.frames=14", "data.frames=14: allowed is 12"),
        ("data.height=88", "data.height=88: allowed is 80"),
        ("data.width=120", "data.width=120: allowed is 128"),
    ],
)
def test_data_encoded_in_another_size_is_refused(override: str, said: str, tmp_path: Path) -> None:
    write_manifest(demo(tmp_path, "recipe=demo"))
    preflight(demo(tmp_path, "recipe=demo"), ["train", "evaluate"])
    assert said in refusal(demo(tmp_path, "recipe=demo", override), "train")


def test_data_of_another_codec_text_encoder_or_without_held_out_clips_is_refused(
    tmp_path: Path,
) -> None:
    cfg = demo(tmp_path, "recipe=demo")
    for changes, said in (
        ({"codec": {"channels": 24}}, "codec.channels=16: allowed is 24"),
        ({"text": {"dim": 32, "length": 16}}, "text.dim=64: allowed is 32"),
        ({"text": {"dim": 64, "length": 8}}, "text.length=16: allowed is 8"),
        ({"splits": {"train": 2}}, "data with heldout clips, for evaluate"),
    ):
        write_manifest(cfg, **changes)
        assert said in refusal(cfg, "train", "evaluate")
    preflight(cfg, ["train"])  # which needs no held-out clips


def test_an_export_that_would_have_no_text_encoder_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name, config in (("text_encoder", {"d_model": 64}), ("tokenizer", {})):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "# @package _global_\ndefaults: [override /noise: shifted, override /text: pipeline]\n"
        f"text: {{path: {model}}}\n"
        'codec: {path: "${asset:demo/teacher/codec}"}\n'
        "data: {frames: 12, height: 80, width: 128}\n"
    )
    cfg = demo(tmp_path, f"recipe={recipe}")
    write_manifest(cfg, text={"dim": 64, "length": 512})
    preflight(cfg, ["train"])
    assert "leave export out of stages" in refusal(cfg, "train", "export")


def test_too_small_a_disk_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 10**8})
    monkeypatch.setattr("gossamer.train.sizes.disk_usage", lambda path: usage)
    monkeypatch.setattr(logging.getLogger("gossamer"), "propagate", True)
    preflight(demo(tmp_path, "recipe=demo"), ["encode", "train"])
    assert "3 checkpoints of 0.1 GB need more than the 0.1 GB free" in caplog.text


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_a_policy_may_keep_just_the_density_asked_for(tmp_path: Path, sparsity: float) -> None:
    """1 - 0.9 as fp32 is above 0.1."""
    given = f"sparsity={sparsity}", f"policy.k={round(1 - sparsity, 9)}", "allocation=fixed"
    check(demo(tmp_path, "device=cpu", "recipe=demo", *given))


def test_a_tracker_that_cannot_start_is_refused_before_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = demo(tmp_path, "recipe=demo", "tracker=wandb", "tracker.mode=on")
    assert "tracker.mode=on: allowed is offline" in refusal(cfg)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    cfg = demo(tmp_path, "recipe=demo", "tracker=tensorboard")
    assert "pip install tensorboard" in refusal(cfg)
