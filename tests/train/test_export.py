"""An export is what was trained: dense for stock diffusers, sparse bit for bit with gossamer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from tiny import tiny_pipeline

import gossamer
from gossamer.sparse.attach import CONFIG_NAME, STATE_NAME, attentions, mask_state
from gossamer.train import checkpoint
from gossamer.train.evaluate import velocities
from gossamer.train.export import export
from gossamer.train.pipeline import LatentVideoPipeline
from gossamer.train.refusal import Refusal
from gossamer.train.samples import noisy_samples

STAGES = ["calibrate", "train", "export"]


@pytest.fixture(scope="module")
def run(lab: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained and exported run; its averaged weights differ from the last ones."""
    runs = tmp_path_factory.mktemp("exported")
    done = launcher.run(lab.student(runs, stages=STAGES, ema=0.5))
    assert done.code == 0, done.text
    assert "velocities equal the trained student's bit for bit" in done.text
    return lab.run(runs)


def again(lab: Any, launcher: Any, run: Any, **settings: Any) -> Any:
    """Run the same job once more, with some settings changed."""
    return launcher.run(lab.student(run.folder.parent, stages=STAGES, ema=0.5, **settings))


def samples_of(job: Any) -> list[Any]:
    dataset = job.dataset("heldout")
    return noisy_samples([dataset[0], dataset[3]], [0.8, 0.2], 2, job.device)


def trained(job: Any, run: Any) -> torch.nn.Module:
    """Put the averaged weights of the run's checkpoint into a fresh student, without the job."""
    tensors, _ = checkpoint.load(run.newest)
    student = job.student(0)
    student.load_state_dict({**tensors["model"], **tensors["ema"]})
    return student.requires_grad_(False).eval()


def test_stock_diffusers_loads_the_transformer_without_a_missing_or_unexpected_key(
    run: Any,
) -> None:
    model, info = WanTransformer3DModel.from_pretrained(
        run.folder / "export" / "transformer", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    tensors, _ = checkpoint.load(run.newest)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in tensors["ema"].items()
    }
    assert all(torch.equal(p, tensors["ema"][name]) for name, p in model.named_parameters())
    assert any(not torch.equal(tensors["ema"][n], tensors["model"][n]) for n in tensors["ema"])
    config = json.loads((run.folder / "export" / "transformer" / "config.json").read_text())
    assert not [key for key in config if "sparse" in key or "gossamer" in key]


def test_a_loaded_export_gives_the_velocities_of_the_trained_student(
    run: Any, make_job: Any
) -> None:
    job = make_job()
    samples, student = samples_of(job), trained(job, run)
    loaded = gossamer.load_pipeline(run.folder / "export").transformer
    expected = velocities(student, samples, "")
    for mine, theirs in zip(velocities(loaded, samples, ""), expected, strict=True):
        assert torch.equal(mine, theirs)
    state = mask_state(loaded)
    assert all(torch.equal(tensor, state[name]) for name, tensor in mask_state(student).items())
    gossamer.detach(loaded)  # now as stock diffusers runs it: densely
    dense = velocities(loaded, samples, "")
    assert not any(torch.equal(d, e) for d, e in zip(dense, expected, strict=True))


def test_a_loaded_pipeline_makes_the_same_video_each_time(run: Any) -> None:
    pipeline = gossamer.load_pipeline(str(run.folder / "export"))
    first = torch.zeros(3, 32, 64)
    options = {"first_frame": first, "frames": 8, "height": 32, "width": 64, "steps": 2}
    video = pipeline("a square", **options, seed=4)
    assert video.shape == (3, 8, 32, 64) and float(video.abs().max()) <= 1
    assert torch.equal(video, pipeline("a square", **options, seed=4))
    assert not torch.equal(video, pipeline("a square", **options, seed=5))
    own_size = {key: options[key] for key in ("first_frame", "frames", "steps")}
    assert torch.equal(video, pipeline("a square", **own_size, seed=4))


@pytest.mark.parametrize(
    ("condition", "options", "said"),
    [
        ("first_frame", {}, "first_frame=None: .*; pass the first frame"),
        ("first_last", {"first_frame": (3, 32, 64)}, "last_frame=None: .*; pass the last frame"),
        ("none", {"first_frame": (3, 32, 64)}, r"first_frame=\[3, 32, 64\]: allowed is None with"),
        (
            "first_frame",
            {"first_frame": (3, 32, 64), "last_frame": (3, 32, 64)},
            "last_frame=.*: allowed is None with a model of condition=first_frame",
        ),
        (
            "first_frame",
            {"first_frame": (3, 32, 64), "height": 64},
            r"first_frame=\[3, 32, 64\]: allowed is a frame \[3, 64, 64\]; resize",
        ),
        (
            "first_last",
            {"first_frame": (3, 32, 64), "last_frame": (3, 32, 32)},
            r"last_frame=\[3, 32, 32\]: allowed is a frame \[3, 32, 64\]; resize",
        ),
    ],
)
def test_frames_that_the_model_or_the_size_do_not_take_are_refused(
    run: Any, condition: str, options: dict[str, Any], said: str
) -> None:
    pipeline = gossamer.load_pipeline(run.folder / "export")
    pipeline.condition = condition
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in options.items()}
    with pytest.raises(Refusal, match=f"^{said}"):
        pipeline("a square", **given)


def test_what_a_latent_pipeline_would_drop_is_refused(run: Any) -> None:
    with pytest.raises(Refusal, match=r"^torch_dtype=torch\.bfloat16: allowed is no argument"):
        gossamer.load_pipeline(run.folder / "export", torch_dtype=torch.bfloat16)


def test_the_export_describes_itself(run: Any) -> None:
    folder = run.folder / "export"
    policy = json.loads((folder / CONFIG_NAME).read_text())
    assert policy["gossamer_version"] == gossamer.__version__
    assert policy["method"]["layout"]["block"] == [1, 2, 2]
    assert set(load_file(folder / STATE_NAME)) == {
        f"blocks.{layer}.attn1.policy.{name}" for layer in (0, 1) for name in "kp"
    }
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "sparsity: 0.6" in card
    assert not list(run.folder.glob(".*")) and not list(folder.rglob("*.bin"))


def test_exporting_the_same_checkpoint_again_is_skipped(run: Any, lab: Any, launcher: Any) -> None:
    before = {f: f.stat().st_mtime_ns for f in (run.folder / "export").rglob("*")}
    done = again(lab, launcher, run)
    assert done.code == 0 and "already the export of the newest checkpoint" in done.text
    assert {f: f.stat().st_mtime_ns for f in (run.folder / "export").rglob("*")} == before


@pytest.mark.case("C11")
def test_an_export_of_anything_else_is_kept_unless_overwriting_is_asked_for(
    run: Any, lab: Any, launcher: Any
) -> None:
    folder = run.folder / "export"
    config = (run.folder / "config.yaml").read_text()
    weights = (folder / "transformer" / "config.json").read_bytes()
    more = {"steps": 12, "resume": "force"}
    other = {"compensation": "drop", "resume": "force"}
    for change in ({"export__dtype": "bfloat16"}, other, more):
        done = again(lab, launcher, run, **change)
        assert done.code == 2 and "set export.overwrite=true" in done.errors[0]
        assert "train seed" not in done.text  # refused before the training, not after
        assert (run.folder / "config.yaml").read_text() == config
    card = folder / "README.md"
    text = card.read_text()
    card.write_text("my own words")
    assert again(lab, launcher, run).code == 2
    assert card.read_text() == "my own words"
    card.write_text(text)
    assert again(lab, launcher, run).code == 0
    (run.folder / "export.json").unlink()
    assert again(lab, launcher, run).code == 2
    done = again(lab, launcher, run, **more, export__overwrite=True)
    assert done.code == 0 and (folder / "transformer" / "config.json").read_bytes() == weights
    assert json.loads((run.folder / "export.json").read_text())["checkpoint"]["name"] == "step-12"


def test_an_export_that_is_killed_leaves_nothing_half_done(
    run: Any, make_job: Any, tmp_path: Path
) -> None:
    job, folder = make_job(), tmp_path / "export"
    options = {"spec": {"method": job.method_spec}, "pipeline": None, "card": "", "overwrite": True}

    def dies(partial: Path) -> None:
        raise KeyboardInterrupt

    for old in (False, True):
        if old:
            (folder / "transformer").mkdir(parents=True)
        with pytest.raises(KeyboardInterrupt):
            export(job.student(0), folder, dtype=torch.float32, before_publish=dies, **options)
        assert folder.exists() is old
    export(job.student(0), folder, dtype=torch.float32, before_publish=lambda p: None, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    assert attentions(gossamer.attach(stock(folder), folder))


def stock(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / "transformer", local_files_only=True)


def test_bf16_keeps_what_diffusers_keeps_in_fp32(make_job: Any, tmp_path: Path) -> None:
    job, student = make_job(), make_job().student(0)
    options = {
        "spec": {"method": job.method_spec},
        "pipeline": None,
        "card": "",
        "overwrite": False,
    }
    export(student, tmp_path / "e", dtype=torch.bfloat16, before_publish=lambda p: None, **options)
    tensors = load_file(tmp_path / "e" / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, tensor in tensors.items():
        expected = torch.float32 if set(name.split(".")) & set(kept) else torch.bfloat16
        assert tensor.dtype == expected, name
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.bfloat16}


def test_a_dense_run_exports_a_plain_model(lab: Any) -> None:
    assert not (lab.teacher / CONFIG_NAME).exists()
    pipeline = LatentVideoPipeline.load(lab.teacher)
    assert pipeline.condition == "first_frame" and pipeline.text.dim == 16
    with pytest.raises(Refusal, match=CONFIG_NAME):
        gossamer.load_pipeline(lab.teacher)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="an export with model_index"):
        gossamer.load_pipeline(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()  # an exported adapter
    with pytest.raises(Refusal, match=r"load_lora_adapter\('.*gossamer\.attach\(pipe, '") as error:
        gossamer.load_pipeline(tmp_path)
    assert "a LoRA adapter" in str(error.value) and "\n" not in str(error.value)


def test_attaching_and_detaching_leaves_a_stock_pipeline_as_it_was(
    run: Any, one_thread: None
) -> None:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)

    def video() -> torch.Tensor:
        return pipeline(
            prompt="a red ball",
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames

    model = pipeline.transformer
    before, keys = video(), list(model.state_dict())
    processors = {name: id(processor) for name, processor in model.attn_processors.items()}
    assert gossamer.attach(pipeline, run.folder / "export") is pipeline
    sparse = video()
    assert gossamer.detach(pipeline) is pipeline
    assert torch.equal(video(), before) and not torch.equal(sparse, before)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.attn_processors.items()} == processors
    assert not model._forward_pre_hooks
