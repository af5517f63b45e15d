"""The Wan recipe: true configs through `gossamer check`, a tiny pipeline through the whole job."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_pipeline

import gossamer
from gossamer.sparse.attach import attentions, detach
from gossamer.train.arms import load_arms
from gossamer.train.cli import main
from gossamer.train.config import compose

RECIPE = "recipe=wan2.1-1.3b-480p"
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


@pytest.fixture
def true_folder(tmp_path: Path) -> Path:
    """Return a pipeline folder with the true configs and one tensor in place of all weights."""
    folder = tmp_path / "wan"
    configs = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": {"d_model": 4096}}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({"stand_in": torch.zeros(1)}, folder / name / "model.safetensors")
    (folder / "tokenizer").mkdir()
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [RECIPE, f"model.path={folder}", f"data.source={folder}", "device=cpu", *more]


def test_the_recipe_has_the_masks_of_the_studys_best_arm() -> None:
    cfg, best = compose([RECIPE]), compose(["recipe=study", *load_arms("study")["F"]])
    for name in ("layout", "estimator", "policy", "allocation", "compensation", "loss"):
        assert cfg[name]._target_ == best[name]._target_, name
    assert cfg.allocation.measure == best.allocation.measure
    assert (cfg.layout.q_block, cfg.layout.kv_block) == (128, 64)


def test_its_comment_gives_the_published_masks() -> None:
    file = Path(gossamer.__file__).parent / "recipes" / "wan2.1-1.3b-480p.yaml"
    line = next(x for x in file.read_text().splitlines() if x.startswith("#   layout="))
    cfg = compose([RECIPE, *line.removeprefix("#").split()])
    assert (cfg.layout.q_block, cfg.layout.kv_block) == (128, 64)
    assert (cfg.policy.k, cfg.policy.p, cfg.sparsity) == (0.03, 0.2, 0.95)
    assert (cfg.steps, cfg.batch_size) == (500, 64)
    assert (cfg.data.frames, cfg.data.height, cfg.data.width, cfg.data.fps) == (81, 480, 832, 16)
    assert cfg.allocation._target_.endswith("Fixed") and cfg.gradient_checkpointing
    kinds = [
        cfg[name]._target_.rpartition(".")[2] for name in ("compensation", "loss", "estimator")
    ]
    assert kinds == ["Drop", "VelocityDistillation", "MeanPool"]


def test_check_answers_from_the_configs_alone(
    true_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.process_time()  # the machine may be busy
    assert main(["check", *overrides(true_folder)]) == 0
    assert time.process_time() - start < 10
    said = capsys.readouterr().err
    for fact in (
        "1,418,996,800",
        "32,760",
        "21 x 30 x 52",
        "256 x 512 of 128 x 64",
        "30 layers of 12 heads, 128 wide",
        "17.03 GB each",
        "64 clips = processes 1 x parts 8 x 8 at once",
        "4.19 MB of latents, at most 4.19 MB of text",
        "check passed",
    ):
        assert fact in said, (fact, said)


def test_check_uses_the_dtype_of_accelerates_mixed_precision(
    true_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = json.dumps({**TRANSFORMER, "num_layers": 2})  # its memory is planned at once
    (true_folder / "transformer" / "config.json").write_text(shallow)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["check", *overrides(true_folder)]) == 0
    assert "bfloat16" in capsys.readouterr().err
    assert main(["check", *overrides(true_folder, "backend=triton")]) == 2
    assert "backend=triton" in capsys.readouterr().err  # no CPU runs bf16 kernels
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main(["check", *overrides(true_folder)]) == 2
    assert "mixed_precision=fp16" in capsys.readouterr().err


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["check", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["model.path=???"], "model.path=???"),
        (["data.source=???"], "data.source=???"),
        (["model.path=/nowhere"], "model.path=/nowhere: allowed is a local diffusers folder"),
        (["data.source=/nowhere"], "data.source=/nowhere"),
        (["data.frames=80"], "frames=80: allowed is 4k + 1; use e.g. frames=81"),
        (["data.height=488"], "data.height=61 latents"),
        (["data.condition=first_frame"], "data.condition=none"),
        (["model.condition=first_frame", "data.condition=first_frame"], "codec.channels=16"),
        (["allocation=fixed", "policy.k=0.06"], "sparsity=0.95: allowed is at most 0.9400"),
        (["sparsity=0.999"], "1 of 512 blocks"),
        (["data.holdout=0"], "data.holdout=0"),
        (["layout.q_block=256", "backend=hopper"], "for backend 'hopper'"),
        (["grad_accumulation=7"], "batch_size=64"),
        (["allocation=fixd"], "did you mean fixed?"),
    ],
)
def test_check_refuses_in_one_line(
    change: list[str], said: str, true_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(overrides(true_folder, *change), capsys)


def test_check_refuses_a_text_encoder_of_another_width(
    true_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (true_folder / "text_encoder" / "config.json").write_text('{"d_model": 512}')
    assert "text.dim=512: allowed is 4096" in refusal(overrides(true_folder), capsys)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_check_refuses_missing_weights(
    part: str, true_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = true_folder / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "a whole .safetensors file" in refusal(overrides(true_folder), capsys)
    weights.unlink()
    assert "*.safetensors weights (there is none)" in refusal(overrides(true_folder), capsys)


def test_check_refuses_a_transformer_of_another_family(
    true_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**TRANSFORMER, "_class_name": "LTXVideoTransformer3DModel"}
    (true_folder / "transformer" / "config.json").write_text(json.dumps(config))
    said = refusal(overrides(true_folder), capsys)
    assert "names WanTransformer3DModel; it names LTXVideoTransformer3DModel" in said


def write_videos(folder: Path) -> None:
    """Write three videos of a square that moves, with captions beside them."""
    import av

    folder.mkdir()
    for number in range(3):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width = stream.height = 32
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", "preset": "ultrafast"}
            for index in range(18):
                frame = np.full((32, 32, 3), 60 + 50 * number, np.uint8)
                frame[8:16, index : index + 8] = (255, 128, 0)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        (folder / f"{number}.txt").write_text(f"a square on ground {number}")


TINY = [
    "device=cpu",
    "data.frames=17",
    "data.height=32",
    "data.width=32",
    "data.fps=null",
    "data.stride=17",
    "data.holdout=0.34",
    "text.max_length=32",
    "layout.q_block=8",
    "layout.kv_block=2",
    "sparsity=0.7",
    "steps=2",
    "batch_size=2",
    "grad_accumulation=2",
    "num_workers=0",
    "optimizer.lr=1e-3",
    "export.dtype=float32",
    "evaluation.sample_steps=2",
]


@pytest.fixture(scope="module")
def finished(made_once: Any) -> Path:
    """Run the recipe on a tiny pipeline and return the run's folder."""

    def fill(root: Path) -> None:
        tiny_pipeline().save_pretrained(root / "wan")
        write_videos(root / "videos")
        paths = [f"model.path={root}/wan", f"data.source={root}/videos", f"data.dir={root}/data"]
        assert main(["train", RECIPE, *paths, f"runs_dir={root}/runs", "name=tiny", *TINY]) == 0

    return made_once("recipe", fill) / "runs" / "tiny"


def generate(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="a red ball",
        height=32,
        width=32,
        num_frames=17,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames


def test_the_run_gave_each_head_a_budget_and_met_the_sparsity(finished: Path) -> None:
    found = json.loads((finished / "calibration" / "calibration.json").read_text())
    assert np.shape(found["k"]) == np.shape(found["layout_choice"]) == (2, 2)
    assert np.shape(found["captured_mass"]) == (2, 2, 3)
    assert np.shape(found["curve_error"])[:3] == (2, 2, 3) and found["measure"] == "velocity"
    assert found["planned_density"] == pytest.approx(0.3, abs=0.01)
    assert found["planned_density"] <= np.mean(found["captured_mass"]) < 1
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 and row["density"] == pytest.approx(0.3, abs=0.01) for row in rows)


def test_the_export_runs_densely_in_stock_diffusers_and_sparsely_through_gossamer(
    finished: Path,
) -> None:
    from diffusers import WanPipeline

    export = finished / "export"
    stock = WanPipeline.from_pretrained(export, local_files_only=True)
    ours = gossamer.load_pipeline(export)
    assert type(ours) is WanPipeline
    dense, sparse = generate(stock), generate(ours)
    assert dense.shape == (1, 17, 32, 32, 3) and np.isfinite(sparse).all()
    assert not np.array_equal(sparse, dense)
    masks = [attention.mask for attention in attentions(ours).values()]
    assert all(mask is not None and mask.density.max() < 0.6 for mask in masks)
    detach(ours)
    assert np.array_equal(generate(ours), dense)


def test_the_exported_transformer_has_the_stock_keys_and_trained_weights(finished: Path) -> None:
    from diffusers import WanTransformer3DModel

    teacher, info = WanTransformer3DModel.from_pretrained(
        finished.parents[1] / "wan", subfolder="transformer", output_loading_info=True
    )
    student, info = WanTransformer3DModel.from_pretrained(
        finished / "export", subfolder="transformer", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = teacher.state_dict(), student.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
