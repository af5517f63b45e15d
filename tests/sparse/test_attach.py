"""Attach, detach and the mask policy on disk: what is refused, and that nothing is left behind."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_wan
from torch import Tensor, nn

from gossamer.sparse.attach import (
    CONFIG_NAME,
    STATE_NAME,
    attach,
    attentions,
    detach,
    families,
    hit_rates,
    load_mask_state,
    load_policy,
    mask_state,
    method_from_spec,
    save_policy,
)
from gossamer.sparse.install import RECORD
from gossamer.sparse.layout import TokenGrid

diffusers = pytest.importorskip("diffusers")
TRAINED = "gossamer.sparse.policies.TrainedHybrid"
SPEC: dict[str, Any] = {
    "layout": {"_target_": "gossamer.sparse.layout.RowMajor", "q_block": 16, "kv_block": 8},
    "estimator": {"_target_": "gossamer.sparse.estimators.mean_pool.MeanPool"},
    "policy": {"_target_": "gossamer.sparse.policies.Hybrid", "k": 0.2, "p": 0.1},
    "compensation": {"_target_": "gossamer.sparse.compensation.Centroid"},
    "backend": "reference",
}


@torch.no_grad()
def run(model: nn.Module, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 4, frames, 8, 8, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16, generator=generator),
        return_dict=False,
    )[0]


def assert_untouched(model: nn.Module) -> None:
    """Require the stock processors, no hook, and that the model can be attached again."""
    assert not model._forward_pre_hooks
    assert not any(name.startswith("blocks.0.attn1.processor") for name in model.state_dict())
    attach(model, None)
    detach(model)


def test_an_unknown_family_is_refused_naming_the_known_ones() -> None:
    other = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
    )
    with pytest.raises(ValueError, match=r"LTXVideo.*allowed is .*WanTransformer3DModel") as error:
        attach(other, None)
    assert "docs/adding_a_model.md" in str(error.value)
    assert not other._forward_pre_hooks


def test_every_family_has_the_four_names() -> None:
    for class_name, family in families().items():
        assert family.MODEL.__name__ == class_name == getattr(diffusers, class_name).__name__
        assert all(hasattr(family, n) for n in ("self_attentions", "token_grid", "Processor"))


def test_a_subclass_belongs_to_its_family() -> None:
    model = tiny_wan()
    before = run(model)
    model.__class__ = type("ShardedWan", (type(model),), {})  # as FSDP2 does
    assert torch.equal(run(attach(model, None)), before)


def test_attaching_twice_and_detaching_twice_are_refused() -> None:
    model = attach(tiny_wan(), None)
    with pytest.raises(ValueError, match="call detach first"):
        attach(model, None)
    detach(model)
    for call in (detach, attentions, mask_state):
        with pytest.raises(ValueError, match="call attach first"):
            call(model)


def test_a_pipeline_stands_for_its_transformer_and_two_transformers_are_refused() -> None:
    model = tiny_wan()
    pipeline = SimpleNamespace(transformer=model)
    assert attach(pipeline, None) is pipeline
    assert attentions(pipeline) == attentions(model)
    assert detach(pipeline) is pipeline
    with pytest.raises(ValueError, match="two transformers"):
        attach(SimpleNamespace(transformer=model, transformer_2=tiny_wan()), None)
    assert_untouched(model)


def test_a_compiled_transformer_is_attached_and_detached_in_either_order() -> None:
    method = method_from_spec(SPEC)
    dense, expected = run(tiny_wan()), run(attach(tiny_wan(), method))
    model = tiny_wan()
    pipeline = SimpleNamespace(transformer=torch.compile(model, backend="eager"))
    torch.testing.assert_close(run(pipeline.transformer), dense)
    for _ in range(2):
        assert attach(pipeline, method) is pipeline and attentions(pipeline) == attentions(model)
        torch.testing.assert_close(run(pipeline.transformer), expected)
        with pytest.raises(ValueError, match="call detach first"):
            attach(pipeline.transformer, method)
        assert hit_rates(pipeline) == {} and detach(pipeline.transformer) is pipeline.transformer
        torch.testing.assert_close(run(pipeline.transformer), dense)
    attach(model, method)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled), expected)
    detach(compiled)
    assert_untouched(model)


@pytest.mark.parametrize("source", [None, method_from_spec(SPEC)], ids=["dense", "sparse"])
def test_a_deep_copy_is_a_model_of_its_own(source: Any) -> None:
    model = attach(tiny_wan(), source)
    run(model, frames=2)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone, frames=3), run(attach(tiny_wan(), source), frames=3))
    assert attentions(clone)["blocks.0.attn1"] is not attentions(model)["blocks.0.attn1"]
    detach(clone)
    assert_untouched(clone)
    run(model, frames=3)


@pytest.mark.parametrize("is_first", [True, False], ids=["attach first", "offload first"])
def test_an_offloaded_model_attends_with_the_same_masks(is_first: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    method = method_from_spec(SPEC)
    model = attach(tiny_wan(), method)
    for i, attention in enumerate(attentions(model).values()):
        attention.policy.set_budget(torch.tensor([0.1, 0.4]) + 0.1 * i, torch.tensor([0.3, 0.0]))
    save_policy(tmp_path, {"method": SPEC}, mask_state(model))
    offloaded = tiny_wan()
    if is_first:
        attach(offloaded, tmp_path)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))  # as a sequential offload does
    if not is_first:
        assert next(offloaded.parameters()).is_meta
        attach(offloaded, tmp_path)
    assert torch.equal(run(offloaded), run(model))
    state = mask_state(offloaded)
    assert all(torch.equal(state[name], x) for name, x in mask_state(model).items())
    detach(offloaded)
    assert torch.equal(run(offloaded), run(tiny_wan()))


def test_saving_an_attached_model_is_refused(tmp_path: Path) -> None:
    model = attach(tiny_wan(), method_from_spec(SPEC))
    for attached in (model, copy.deepcopy(model), torch.compile(model)):
        with pytest.raises(ValueError, match=r"^save_pretrained: allowed .*gossamer\.detach first"):
            attached.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert "save_pretrained" not in detach(model).__dict__
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == tiny_wan().state_dict().keys()


def test_mask_numbers_follow_the_tokens_to_their_device() -> None:
    method = method_from_spec(SPEC | {"policy": {"_target_": TRAINED, "k": 0.2}})
    model = attach(tiny_wan(), method)
    policy = attentions(model)["blocks.0.attn1"].policy
    context = model.__dict__[RECORD].context
    context.grid = TokenGrid(2, 4, 4)
    q = torch.empty(1, 32, 2, 16, device="meta")  # stands for a GPU
    context.attend(attentions(model)["blocks.0.attn1"], q, q, q)
    assert policy.k.is_meta and policy.k_shift.is_meta
    assert attentions(model)["blocks.1.attn1"].policy.k.device.type == "cpu"


def test_a_saved_policy_gives_the_same_outputs(tmp_path: Path) -> None:
    model = attach(tiny_wan(), method_from_spec(SPEC))
    for i, attention in enumerate(attentions(model).values()):
        attention.policy.set_budget(torch.tensor([0.1, 0.4]) + 0.1 * i, torch.tensor([0.3, 0.0]))
    save_policy(tmp_path, {"method": SPEC}, mask_state(model))
    again = attach(tiny_wan(), tmp_path)
    assert torch.equal(run(again), run(model))
    assert not torch.equal(run(again), run(attach(tiny_wan(), method_from_spec(SPEC))))


def test_a_policy_of_another_model_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    save_policy(
        tmp_path,
        {"method": SPEC},
        mask_state(attach(tiny_wan(num_layers=3), method_from_spec(SPEC))),
    )
    model = tiny_wan()
    with pytest.raises(ValueError, match=r"blocks\.2\.attn1.*4 tensors"):
        attach(model, tmp_path)
    assert_untouched(model)


def test_mask_state_of_other_shapes_or_numbers_is_refused() -> None:
    model = attach(tiny_wan(), method_from_spec(SPEC))
    state = {name: tensor.clone() for name, tensor in mask_state(model).items()}
    name = "blocks.1.attn1.policy.p"
    for wrong in (torch.zeros(3), torch.full((2,), float("nan"))):
        with pytest.raises(ValueError, match=name):
            load_mask_state(model, state | {name: wrong})
    assert all(torch.equal(mask_state(model)[n], tensor) for n, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("policy.k", 7.0, "k=[7.0, 7.0]: allowed is a share"),
        ("policy.p", -torch.inf, "p=[-inf, -inf]: allowed is a share"),
        ("layout.choice", 9, "choice=[9, 9]: allowed is 0 to 3"),
        ("compensation.skip_below", 1.0, "skip_below=[1.0, 1.0]: allowed is at most 0"),
    ],
)
def test_a_policy_with_numbers_out_of_range_is_refused(
    name: str, value: float, said: str, tmp_path: Path
) -> None:
    spec = SPEC | {
        "layout": {"_target_": "gossamer.sparse.layouts.per_head.PerHead"},
        "compensation": {"_target_": "gossamer.sparse.filtered_drop.FilteredDrop"},
    }
    spec["compensation"]["skip_below"] = -torch.inf
    model = attach(tiny_wan().eval(), method_from_spec(spec))
    state = mask_state(model)
    save_policy(tmp_path, {"method": spec}, state)
    detach(model)
    assert torch.equal(
        mask_state(attach(model, tmp_path))["blocks.1.attn1.policy.k"], torch.full((2,), 0.2)
    )
    detach(model)
    state[f"blocks.1.attn1.{name}"].fill_(value)
    save_policy(tmp_path, {"method": spec}, state)
    with pytest.raises(ValueError, match=re.escape(f"mask policy=blocks.1.attn1: {said}")):
        attach(model, tmp_path)
    assert_untouched(model)


def test_a_policy_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    model = tiny_wan()
    state = mask_state(attach(tiny_wan(), method_from_spec(SPEC)))

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=said) as error:
            attach(model, tmp_path)
        assert "; " in str(error.value) and "allowed" in str(error.value)
        assert_untouched(model)

    refused(f"{CONFIG_NAME} is missing")
    save_policy(tmp_path, {"method": SPEC}, state)
    assert load_policy(tmp_path)[0].backend == "reference"
    whole = json.loads((tmp_path / CONFIG_NAME).read_text())
    for text, said in (
        ("{", "damaged"),
        (json.dumps({"format_version": 1}), "damaged"),
        (json.dumps(whole | {"format_version": 2}), "format_version=2"),
        (json.dumps(whole | {"method": SPEC | {"layers": 3}}), "layers"),
        (json.dumps(whole | {"method": SPEC | {"layout": {"_target_": "os.system"}}}), "os.system"),
    ):
        (tmp_path / CONFIG_NAME).write_text(text)
        refused(said)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(whole))
    (tmp_path / STATE_NAME).write_bytes(b"short")
    refused("damaged")
    save_file({name: tensor + torch.nan for name, tensor in state.items()}, tmp_path / STATE_NAME)
    assert load_file(tmp_path / STATE_NAME)
    refused("finite")
