"""Where transformers come from: folders that are whole, or refused; and how velocity calls them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.sparse.attach import attach
from gossamer.train.codec import DiffusersVAECodec
from gossamer.train.model import Pretrained, ScratchWan, compile_blocks, velocity
from gossamer.train.refusal import Refusal
from gossamer.train.text import PipelineText

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"num_layers": 2, "num_heads": 2, "head_dim": 16, "ffn_dim": 32, "channels": 4}


def scratch(**settings: Any) -> ScratchWan:
    return ScratchWan(**{**TINY, "text_dim": 16, **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a pipeline folder that holds a tiny transformer."""
    scratch().load(seed=3).save_pretrained(tmp_path / "transformer")
    return tmp_path


def change_weights(folder: Path, change: Any) -> None:
    """Rewrite the transformer's tensors by `change`, a function of the dict."""
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_pipeline_folder_and_its_transformer_folder_give_the_saved_weights(folder: Path) -> None:
    expected = scratch().load(seed=3).state_dict()
    for path in (folder, folder / "transformer"):
        model = Pretrained(path=str(path)).load(seed=0)
        found = model.state_dict()
        assert found.keys() == expected.keys() and not model.training
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bf16_weights_are_loaded_in_fp32(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    model = Pretrained(path=str(folder)).load(seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_skeleton_has_the_config_and_shapes_without_memory(folder: Path) -> None:
    source = Pretrained(path=str(folder))
    skeleton, model = source.skeleton(), source.load(seed=0)
    assert skeleton.config.in_channels == 4 and skeleton.config.text_dim == 16
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())
    assert scratch().skeleton().config.num_layers == 2


def refused(folder: Path, said: str, *, load: bool = True) -> None:
    source = Pretrained(path=str(folder))
    with pytest.raises(Refusal, match=said) as error:
        source.load(seed=0) if load else source.skeleton()
    assert error.value.field == "model.path" and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused_with_the_way_to_get_it(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "hf download", load=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "in JSON"),
        ("[]", "names WanTransformer3DModel; it names None"),
        ('{"_class_name": "FluxTransformer2DModel"}', "it names FluxTransformer2DModel"),
        ('{"_class_name": "WanTransformer3DModel", "num_layers": "two"}', "mend it"),
    ],
)
def test_a_config_that_is_no_known_transformer_is_refused(
    text: str, said: str, folder: Path
) -> None:
    (folder / "transformer" / "config.json").write_text(text)
    refused(folder, said, load=False)


def test_a_stamp_knows_a_copy_and_tells_other_weights(folder: Path, tmp_path: Path) -> None:
    own = Pretrained(path=str(folder))
    copy = Pretrained(path=str(shutil.copytree(folder, tmp_path / "copy")))
    assert copy.stamp() == own.stamp() != ScratchWan().stamp() == ""
    change_weights(folder, lambda t: t.update({n: x + 1 for n, x in t.items() if "to_q" in n}))
    assert copy.stamp() != own.stamp()


def test_missing_or_cut_weights_are_refused_without_reading_them(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    source = Pretrained(path=str(folder))
    source.check_weights()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(Refusal, match=r"a whole \.safetensors file"):
        source.check_weights()
    file.unlink()
    with pytest.raises(Refusal, match="there is none"):
        source.check_weights()


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "diff', "[]", "{}"])
def test_a_cut_index_of_the_weights_is_refused(index: str, folder: Path) -> None:
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(Refusal, match=r"an index of \.safetensors files in JSON"):
        Pretrained(path=str(folder)).check_weights()


def test_a_missing_shard_is_named(folder: Path) -> None:
    transformer = folder / "transformer"
    (transformer / WEIGHTS).unlink()
    scratch().load(seed=3).save_pretrained(transformer, max_shard_size="50KB")
    shards = sorted(transformer.glob("*.safetensors"))
    assert len(shards) > 1
    Pretrained(path=str(folder)).load(seed=0)
    shards[1].unlink()
    refused(folder, shards[1].name)


@pytest.mark.case("N5")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("proj_out.bias"), r"1 differ: proj_out\.bias"),
        (lambda t: t.update({"blocks.0.to_gate": torch.zeros(2)}), r"1 differ: blocks\.0\.to_gate"),
        (lambda t: t["proj_out.bias"].fill_(float("nan")), r"1 differ: proj_out\.bias"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), r"proj_out\.bias"),
    ],
    ids=["missing", "no place for it", "not finite", "misshapen"],
)
def test_weights_of_another_model_are_refused(change: Any, said: str, folder: Path) -> None:
    change_weights(folder, change)
    refused(folder, said)


def test_weights_from_nothing_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (scratch().load(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # the global generator stays as it was
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


def test_an_unknown_condition_is_refused() -> None:
    for make in (scratch, lambda **settings: Pretrained(path="x", **settings)):
        with pytest.raises(ValueError, match="condition=last_frame: allowed is none or"):
            make(condition="last_frame")


class Recorder(nn.Module):
    """Stands for a transformer: records the call and returns the first four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(8, 4, 1, dtype=torch.bfloat16)
        self.call: dict[str, Any] = {}

    def forward(self, **call: Any) -> tuple[Tensor]:
        self.call = call
        return (call["hidden_states"][:, :4],)


def test_velocity_scales_the_noise_level_and_puts_the_condition_after_the_latents() -> None:
    model = Recorder()
    x, condition = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    t, text = torch.tensor([0.25, 1.0]), torch.randn(2, 5, 16)
    out = velocity(model, x, t, text, condition)
    assert out.dtype == torch.float32 and torch.equal(out, x.bfloat16().float())
    expected = torch.cat([x, condition], 1).bfloat16()
    assert torch.equal(model.call["hidden_states"], expected)
    assert model.call["timestep"].tolist() == [250.0, 1000.0]
    assert torch.equal(model.call["encoder_hidden_states"], text.bfloat16())
    assert torch.equal(velocity(model, x, t, text, None), x.bfloat16().float())
    assert model.call["hidden_states"].shape == x.shape


def test_a_codec_and_a_text_encoder_read_no_weights_before_their_first_use(tmp_path: Path) -> None:
    for name, config in (
        ("vae", {"_class_name": "AutoencoderKLWan", "z_dim": 16}),
        ("text_encoder", {"d_model": 4096}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer").mkdir()
    codec, text = DiffusersVAECodec(path=tmp_path), PipelineText(path=tmp_path)
    assert codec.to("cpu").latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert (text.to("cpu").dim, text.length) == (4096, 512)
    for use in (codec.check_weights, lambda: codec.encode(torch.zeros(1, 3, 5, 16, 16))):
        with pytest.raises(Refusal, match=r"codec\.path=.*there is none"):
            use()
    with pytest.raises(Refusal, match=r"text\.path=.*there is none"):
        text.check_weights()
    with pytest.raises(Refusal, match=r"text\.path=.*a tokenizer"):
        text.encode(["a"])


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 8}'])
def test_a_text_encoder_without_a_umt5_config_is_refused(text: str, tmp_path: Path) -> None:
    for name in ("tokenizer", "text_encoder"):
        (tmp_path / name).mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(Refusal, match=r"text_encoder/config\.json of a UMT5"):
        PipelineText(path=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tuned", [False, True])
def test_compiled_blocks_give_the_gradients_of_eager_ones_for_one_clip(tuned: bool) -> None:
    # large enough that Inductor would fuse reductions over rows with those over columns
    shape = {"head_dim": 128, "num_heads": 8, "ffn_dim": 2048, "text_dim": 64}
    model = attach(scratch(**shape, channels=16).load(0).cuda(), None)
    noise = torch.randn(1, 16, 8, 32, 32, device="cuda")
    text, t = torch.randn(1, 16, 64, device="cuda"), torch.full((1,), 0.5, device="cuda")

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            velocity(model, noise, t, text, None).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = gradients()
    compile_blocks(model, tuned=tuned)
    compiled = gradients()
    assert compiled.keys() == eager.keys()
    for name, gradient in eager.items():
        assert (compiled[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-8, name
