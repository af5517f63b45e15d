"""LoRA students: what trains, what a checkpoint holds, and both ways to export."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import gossamer
from gossamer.sparse.attach import mask_state
from gossamer.train import checkpoint
from gossamer.train.evaluate import velocities
from gossamer.train.lora import FILE, adapted_layers, base_of, count_parameters, merge
from gossamer.train.samples import noisy_samples

LORA = {"lora__rank": 4, "lora__alpha": 10.0}
STAGES = ["calibrate", "train", "export"]
SETTINGS = {**LORA, "teacher": "shared", "ema": 0.5, "stages": STAGES, "export__lora": "adapter"}
WIDTH, FFN, LAYERS = 32, 64, 2


@pytest.fixture(scope="module")
def run(lab: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained LoRA run, exported as an adapter."""
    runs = tmp_path_factory.mktemp("lora")
    done = launcher.run(lab.student(runs, **SETTINGS))
    assert done.code == 0, done.text
    assert "velocities equal the trained student's bit for bit" in done.text
    return lab.run(runs)


def again(lab: Any, launcher: Any, run: Any, **settings: Any) -> Any:
    return launcher.run(lab.student(run.folder.parent, **{**SETTINGS, **settings}))


@pytest.fixture
def student(run: Any, make_job: Any) -> torch.nn.Module:
    """The trained student with its averaged adapters, put together without the job."""
    model = make_job(**LORA).student(0)
    tensors, _ = checkpoint.load(run.newest)
    unknown = model.load_state_dict({**tensors["model"], **tensors["ema"]}, strict=False)
    assert not unknown.unexpected_keys
    return model.requires_grad_(False).eval()


def samples_of(job: Any) -> list[Any]:
    dataset = job.dataset("heldout")
    return noisy_samples([dataset[0], dataset[3]], [0.8, 0.2], 2, job.device)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ("attention", [(WIDTH, WIDTH)] * 4),
        ("linear", [(WIDTH, WIDTH)] * 8 + [(WIDTH, FFN), (FFN, WIDTH)]),
    ],
)
def test_the_adapters_stand_where_the_config_says(
    layers: str, sizes: list[tuple[int, int]], make_job: Any
) -> None:
    job = make_job(**LORA, lora__layers=layers)
    model = job.student(0)
    expected = LAYERS * sum(4 * (a + b) for a, b in sizes)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == expected
    assert all("lora_" in name and name.startswith("blocks.") for name in trainable)
    assert count_parameters(job.source.skeleton(), job.cfg.lora) == expected
    names = adapted_layers(job.dense(), layers)
    assert len(names) == LAYERS * len(sizes)
    if layers == "attention":
        own = ("to_q", "to_k", "to_v", "to_out.0")
        assert set(names) == {f"blocks.{i}.attn1.{n}" for i in range(LAYERS) for n in own}


def test_fresh_adapters_change_nothing_and_are_seeded(make_job: Any) -> None:
    job = make_job(**LORA)
    samples = samples_of(job)
    torch.manual_seed(1)
    first, full = job.student(0), make_job().student(0)
    torch.manual_seed(2)
    second = job.student(0)
    assert torch.initial_seed() == 2
    for mine, theirs in zip(
        velocities(first, samples, ""), velocities(full, samples, ""), strict=True
    ):
        assert torch.equal(mine, theirs)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = job.student(5)
    assert not torch.equal(
        first.get_parameter("blocks.0.attn1.to_q.lora_A.default.weight"),
        other.get_parameter("blocks.0.attn1.to_q.lora_A.default.weight"),
    )


def test_a_checkpoint_holds_the_adapters_and_the_masks_alone(run: Any, make_job: Any) -> None:
    tensors, state = checkpoint.load(run.newest)
    adapters = {n for n in tensors["model"] if "lora_" in n}
    masks = {n for n in tensors["model"] if ".processor." in n}
    assert tensors["model"].keys() == adapters | masks and len(adapters) == 2 * 4 * LAYERS
    assert tensors["ema"].keys() == adapters
    assert len(masks) == 2 * LAYERS
    assert state["base"] == base_of(make_job(**LORA).student(0))
    assert {name.rpartition("/")[0] for name in tensors["optimizer"]} == adapters


def test_a_lora_run_that_dies_ends_as_the_unbroken_one(
    run: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    overrides = lab.student(tmp_path, **SETTINGS)
    assert launcher.run(overrides, fault=(1, "after-rename")).code == -9
    assert launcher.run(overrides, fault=(1, "before-manifest")).code == -9
    assert launcher.run(overrides).code == 0
    assert lab.run(tmp_path).losses == run.losses
    assert lab.run(tmp_path).weights == run.weights


def test_adapters_of_another_base_are_refused(
    run: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    shutil.copytree(lab.teacher, tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.weight"][0, 0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copytree(run.folder, tmp_path / "student")
    settings = {**SETTINGS, "model__path": tmp_path / "other", "resume": "force", "steps": 9}
    settings["calibration__path"] = None
    for stages in (["calibrate", "train"], ["export"]):
        shutil.rmtree(tmp_path / "student" / "export", ignore_errors=True)
        done = launcher.run(lab.student(tmp_path, **{**settings, "stages": stages}))
        assert done.code == 2 and "adapters of the model's weights (SHA-256" in done.errors[0]


def test_a_full_run_does_not_go_on_from_adapters(
    run: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "student")
    settings = {"ema": 0.5, "resume": "force", "steps": 9, "stages": ["train"]}
    done = launcher.run(lab.student(tmp_path, **settings))
    assert done.code == 2 and "checkpoint=" in done.errors[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_changes_no_bit(
    recompute: bool, run: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "gradient_checkpointing": recompute, "stages": ["calibrate", "train"]}
    assert launcher.run(lab.student(tmp_path, **settings)).code == 0
    assert lab.run(tmp_path).losses == run.losses


def test_an_exported_adapter_loads_in_diffusers_and_its_masks_in_gossamer(
    run: Any, student: Any, make_job: Any, lab: Any
) -> None:
    folder = run.folder / "export"
    assert {p.name for p in folder.iterdir()} == {
        FILE,
        "README.md",
        "sparse_attention.safetensors",
        "sparse_attention_config.json",
    }
    model = WanTransformer3DModel.from_pretrained(lab.teacher / "transformer")
    model.load_lora_adapter(folder, use_safetensors=True)
    assert model.peft_config["default_0"].lora_alpha == 10.0  # else diffusers takes the rank
    gossamer.attach(model, folder)
    samples = samples_of(make_job())
    expected = velocities(student, samples, "")
    for mine, theirs in zip(velocities(model, samples, ""), expected, strict=True):
        assert torch.equal(mine, theirs)
    state = mask_state(model)
    assert all(torch.equal(t, state[name]) for name, t in mask_state(student).items())
    card = (folder / "README.md").read_text()
    assert "load_lora_adapter(folder, use_safetensors=True)" in card and str(lab.teacher) in card


def test_a_pipeline_of_diffusers_reads_the_adapter(run: Any) -> None:
    from diffusers import WanPipeline

    state = WanPipeline.lora_state_dict(str(run.folder / "export"))
    assert len(state) == 2 * 4 * LAYERS
    assert all(name.startswith("transformer.blocks.") for name in state)


def test_a_merged_export_is_the_student_in_stock_diffusers(
    run: Any, student: Any, make_job: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "student", ignore=shutil.ignore_patterns("export*"))
    settings = {**SETTINGS, "export__lora": "merged", "stages": ["export"]}
    done = launcher.run(lab.student(tmp_path, **settings))
    assert done.code == 0 and "bit for bit" in done.text, done.text
    assert "merging the adapter moved the velocity by" in done.text
    folder = tmp_path / "student" / "export"
    model, info = WanTransformer3DModel.from_pretrained(
        folder / "transformer", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    tensors, _ = checkpoint.load(run.newest)
    base = load_file(lab.teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight")
        a = tensors["ema"].get(f"{layer}.lora_A.default.weight")
        update = torch.zeros(())
        if a is not None and name.endswith(".weight"):
            b = tensors["ema"][f"{layer}.lora_B.default.weight"]
            update = 10.0 / 4 * b.double() @ a.double()
            assert float(update.abs().max()) > 1e-5
        torch.testing.assert_close(weight.double(), base[name].double() + update, atol=1e-7, rtol=0)
    loaded = gossamer.load_pipeline(folder).transformer
    samples = samples_of(make_job())
    before = velocities(student, samples, "")
    for mine, theirs in zip(velocities(loaded, samples, ""), before, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


def test_an_export_of_the_other_kind_is_not_replaced(run: Any, lab: Any, launcher: Any) -> None:
    done = again(lab, launcher, run, export__lora="merged")
    assert done.code == 2 and "set export.overwrite=true" in done.errors[0]
    done = again(lab, launcher, run)
    assert done.code == 0 and "already the export of the newest checkpoint" in done.text


def test_merging_leaves_a_plain_model(student: Any, make_job: Any) -> None:
    merge(student)
    plain = make_job().student(0)
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert base_of(student) is None


def test_a_lora_run_without_peft_is_refused_in_one_line(
    lab: Any, launcher: Any, tmp_path: Path
) -> None:
    done = launcher.run(lab.student(tmp_path, **SETTINGS), hide="peft")
    assert done.code == 2 and len(done.errors) == 1
    assert "lora.rank=4: allowed is 0 where peft is not installed" in done.errors[0]
    assert "pip install gossamer[lora]" in done.errors[0]
    full = {"steps": 1, "stages": ["calibrate", "train"]}
    assert launcher.run(lab.student(tmp_path, name="full", **full), hide="peft").code == 0


def test_adapters_learn(run: Any, student: Any) -> None:
    assert np.isfinite([row[1] for row in run.losses]).all()
    state = json.loads((run.newest / "state.json").read_text())
    assert state["step"] == 8
    b = [p for n, p in student.named_parameters() if "lora_B" in n]
    assert all(float(p.abs().max()) > 0 for p in b)


@pytest.mark.multi
def test_two_processes_train_the_shared_teacher_as_one_does(
    run: Any, lab: Any, launcher: Any, tmp_path: Path
) -> None:
    for done in launcher.ranks(lab.student(tmp_path, **SETTINGS)):
        assert done.code == 0, done.text
    mine, one = np.array(lab.run(tmp_path).losses), np.array(run.losses)
    np.testing.assert_allclose(mine, one, rtol=1e-3)
