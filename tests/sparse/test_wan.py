"""Wan through gossamer's processors against stock diffusers; the true sizes on the meta device."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tiny import tiny_wan
from torch import Tensor, nn

from gossamer.sparse.attach import attach, attentions, detach, mask_state, share_sequence
from gossamer.sparse.attention import DenseAttention, SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.router import Router
from gossamer.sparse.layout import RowMajor, Tiles, TokenGrid
from gossamer.sparse.models.context import AttentionContext
from gossamer.sparse.models.wan import (
    Processor,
    TextProcessor,
    angles,
    in_parts,
    rotate,
    token_grid,
)
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.sparse.sequence import SequenceParallel

diffusers = pytest.importorskip("diffusers")
WanAttnProcessor = diffusers.models.transformers.transformer_wan.WanAttnProcessor
GRIDS = [(3, 4, 4), (2, 5, 7), (1, 1, 1), (5, 3, 11)]
TRUE_SIZES = {
    "1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
PARAMETERS = {"1.3B": 1_418_996_800, "14B": 14_288_491_584}  # of the published checkpoints


def wan(head_dim: int = 16, *, seed: int = 0, **config: Any) -> nn.Module:
    return tiny_wan(seed, attention_head_dim=head_dim, **config)


def true_wan(size: str) -> nn.Module:
    config = {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "eps": 1e-6}
    config |= {"in_channels": 16, "out_channels": 16, "cross_attn_norm": True}
    with torch.device("meta"):
        return diffusers.WanTransformer3DModel(
            qk_norm="rms_norm_across_heads", **config, **TRUE_SIZES[size]
        )


def inputs(
    grid: tuple[int, int, int] = (3, 4, 4), *, timestep_per_token: bool = False
) -> dict[str, Tensor]:
    """Return latents that give such a token grid, two noise levels and seven text tokens."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = grid
    timestep = torch.tensor([900.0, 30.0])
    if timestep_per_token:
        timestep = timestep[:, None] * torch.rand(2, frames * height * width, generator=generator)
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * height, 2 * width, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator),
    }


def run(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    return model(**call, return_dict=False)[0]


def gradients(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return d(sum of squares of the output) for each parameter."""
    model.zero_grad(set_to_none=True)
    run(model, call).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sparse(k: float = 0.3, compensation: Any = None, layout: Any = None) -> SparseMethod:
    return SparseMethod(
        layout=layout or RowMajor(q_block=16, kv_block=8),
        estimator=MeanPool(),
        policy=Hybrid(k=k),
        compensation=compensation or Drop(),
    )


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16 weights"])
@pytest.mark.parametrize("fused", [False, True], ids=["q, k, v", "fused qkv"])
@pytest.mark.parametrize("head_dim", [12, 16, 32])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.no_grad()
def test_dense_attention_equals_the_stock_processor_bit_for_bit(
    head_dim: int, fused: bool, precision: str
) -> None:
    model = wan(head_dim)
    if fused:
        model.fuse_qkv_projections()
    if precision == "bf16 weights":
        model.to(torch.bfloat16)
    for grid, per_token in product(GRIDS, (False, True)):
        call = inputs(grid, timestep_per_token=per_token)
        for name in ("hidden_states", "encoder_hidden_states"):
            call[name] = call[name].to(model.dtype)
        with autocast(precision == "bf16 autocast"):
            stock = run(model, call)
            ours = run(attach(model, None), call)
        detach(model)
        assert torch.equal(ours, stock), (grid, per_token)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_gradients_equal_those_of_the_stock_processor(checkpointing: bool, mixed: bool) -> None:
    model = wan(16).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    call = inputs((2, 5, 7))
    with autocast(mixed):
        stock = gradients(model, call)
        ours = gradients(attach(model, None), call)
    assert stock.keys() == ours.keys() and len(stock) > 50
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_compiled_code_gets_back_gradients_that_it_need_not_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, contiguous = AttentionContext.attend, []

    def attend(context: AttentionContext, attention: nn.Module, *qkv: Tensor) -> Tensor:
        for x in qkv:
            contiguous.append(x.is_contiguous())
            x.register_hook(lambda gradient: contiguous.append(gradient.is_contiguous()))
        out = own(context, attention, *qkv)
        contiguous.append(out.is_contiguous())
        return out

    monkeypatch.setattr(AttentionContext, "attend", attend)
    gradients(attach(wan(16).train(), None), inputs())
    assert contiguous == [True] * 2 * 7  # layers; q, k, v, their gradients, the output


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate by the processor's formula; angle [S, D / 2]."""
    cos, sin = (f(angle).repeat_interleave(2, -1)[None, :, None] for f in (torch.cos, torch.sin))
    return rotate(x, *angles(cos, sin))


def test_rotation_and_its_gradient_are_those_of_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 2, 5, 3, 8, generator=generator, dtype=torch.float64)
    angle = 7 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    out = turned(x, angle)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    expected, back = (
        torch.view_as_real(torch.view_as_complex(y.detach().unflatten(-1, (-1, 2))) * t).flatten(-2)
        for y, t in ((x, turn), (g, turn.conj()))
    )
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    (gradient,) = torch.autograd.grad(out, x, g)
    torch.testing.assert_close(gradient, back, rtol=1e-14, atol=1e-14)


def test_compiled_rotation_writes_no_slices_and_no_zeros() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []

    def keep(graph: Any, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    x, angle = torch.randn(1, 6, 2, 8, requires_grad=True), torch.randn(6, 4)
    out = torch.compile(turned, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(x, angle)
    torch.testing.assert_close(out, turned(x, angle))
    out.sum().backward()
    torch._dynamo.reset()
    assert sum("aten.flip" in name for name in seen) == 2  # forward and backward
    assert not [n for n in seen if any(word in n for word in ("scatter", "backward", "zeros"))]


@pytest.mark.parametrize("compensation", [Drop(), Centroid()])
def test_gradient_checkpointing_changes_no_bit_of_the_sparse_gradients(compensation: Any) -> None:
    model = attach(wan(16).train(), sparse(0.3, compensation))
    call = inputs((3, 4, 6))
    plain = gradients(model, call)
    masks = [attention.mask.selected for attention in attentions(model).values()]
    model.enable_gradient_checkpointing()
    chosen: list[Any] = []
    for attention in attentions(model).values():
        attention.policy.register_forward_hook(lambda *call: chosen.append(call))
    recomputed = gradients(model, call)
    assert len(chosen) == len(masks)  # once in each layer: the mask is kept for the recompute
    for attention, mask in zip(attentions(model).values(), masks, strict=True):
        assert torch.equal(attention.mask.selected, mask)
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_compiled_and_checkpointed_blocks_give_the_gradients_of_trained_masks() -> None:
    method = replace(sparse(), estimator=Router(side=2), policy=TrainedHybrid(k=0.3))
    model, call = attach(wan(16).train(), method), inputs((3, 4, 6))
    plain = gradients(model, call)
    model.enable_gradient_checkpointing()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    compiled = gradients(model, call)
    assert compiled.keys() == plain.keys()
    for name, gradient in compiled.items():
        assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm(), name


@pytest.mark.parametrize("compensation", [Drop(), Centroid()])
@pytest.mark.parametrize("layout", [RowMajor(q_block=16, kv_block=8), Tiles(block=(2, 2, 4))])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_sparse_attention_with_every_block_equals_dense(
    grid: tuple[int, int, int], layout: Any, compensation: Any
) -> None:
    model, call = wan(), inputs(grid)
    dense = run(model, call)
    attach(model, sparse(1.0, compensation, layout))
    torch.testing.assert_close(run(model, call), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.no_grad()
def test_sparse_attention_runs_under_bf16_autocast() -> None:
    model, call = wan(), inputs()
    with autocast(True):
        dense = run(model, call)
        ours = run(attach(model, sparse(1.0, Centroid())), call)
    assert ours.dtype == dense.dtype
    assert (ours - dense).float().norm() < 0.01 * dense.float().norm()


@torch.no_grad()
def test_fewer_blocks_change_the_output() -> None:
    model, call = wan(), inputs()
    dense = run(model, call)
    assert not torch.allclose(run(attach(model, sparse(0.2)), call), dense, atol=1e-4)


@torch.no_grad()
def test_detach_restores_the_outputs_the_processors_and_the_keys() -> None:
    model, call = wan(), inputs()
    before, keys = run(model, call), list(model.state_dict())
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    run(attach(model, sparse()), call)
    assert list(model.state_dict()) != keys
    detach(model)
    assert torch.equal(run(model, call), before)
    assert list(model.state_dict()) == keys
    after = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    assert after.keys() == processors.keys()
    assert all(after[name] is processor for name, processor in processors.items())
    assert not model._forward_pre_hooks


class OwnProcessor(WanAttnProcessor):
    """A user's own, for attention to the text."""


def test_attention_to_text_keeps_a_users_processor_and_backend_and_one_to_images_its_own() -> None:
    model, with_image = wan(num_layers=2), wan(added_kv_proj_dim=32, image_dim=16)
    model.blocks[0].attn2.processor = own = OwnProcessor()
    model.blocks[1].attn2.processor._attention_backend = "_native_math"
    attach(model, sparse())
    assert model.blocks[0].attn2.processor is own
    assert isinstance(model.blocks[1].attn2.processor, TextProcessor)
    assert model.blocks[1].attn2.processor._attention_backend == "_native_math"
    assert all(isinstance(block.attn1.processor, Processor) for block in model.blocks)
    stock = [block.attn2.processor for block in with_image.blocks]
    attach(with_image, sparse())
    assert [block.attn2.processor for block in with_image.blocks] == stock


@pytest.mark.parametrize(
    ("tokens", "parts"), [(64, 8), (65, 5), (66, 6), (67, 1), (63, 7), (56, 8), (48, 1)]
)
def test_queries_in_parts_give_what_whole_ones_give(tokens: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def draw(length: int) -> Tensor:
        x = torch.randn(2, length, 3, 4, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    q, k, v = draw(tokens), draw(7), draw(7)
    asked = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(q.shape[:2])
        assert q.data_ptr() == given.data_ptr()  # no copy
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    given = q
    whole, split = attend(q, k, v), in_parts(attend, q, k, v)
    assert asked[1] == (2 * parts, tokens // parts)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)
    weight = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((whole * weight).sum(), (q, k, v))
    found = torch.autograd.grad((split * weight).sum(), (q, k, v))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_gradients_on_a_gpu_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(wan(16).cuda().train(), None)
    call = {name: x.cuda() for name, x in inputs((3, 8, 8)).items()}
    split = gradients(model, call)
    monkeypatch.setattr("gossamer.sparse.models.wan.PARTS", 1)
    whole = gradients(model, call)
    assert split.keys() == whole.keys()
    for name, gradient in split.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_nothing_is_left_behind_after_an_exception() -> None:
    model, call = wan(), inputs()
    before = run(model, call)
    attach(model, sparse())
    with pytest.raises(RuntimeError):
        run(model, call | {"encoder_hidden_states": torch.zeros(2, 7, 5)})
    with pytest.raises(TypeError, match="timestep"):
        model(hidden_states=call["hidden_states"])
    once = run(model, call)
    assert torch.equal(run(model, call), once)
    detach(model)
    assert not model._forward_pre_hooks and torch.equal(run(model, call), before)


@torch.no_grad()
def test_another_clip_size_gets_its_own_grid_and_mask() -> None:
    model = attach(wan(), sparse())
    for grid in GRIDS:
        alone = attach(wan(), sparse())
        assert torch.equal(run(model, inputs(grid)), run(alone, inputs(grid)))


@torch.no_grad()
def test_detach_ends_the_sharing_of_tokens() -> None:
    model, call = wan(), inputs()
    expected = run(model, call)
    share_sequence(attach(model, None), SequenceParallel(None, 1, 2))
    assert torch.equal(run(detach(model), call), expected)


def test_error_budgets_of_a_layer_are_refused_where_processes_share_its_heads() -> None:
    for scope, found in (("head", nullcontext()), ("layer", pytest.raises(ValueError))):
        policy = ErrorBudget(scope=scope)
        model = attach(wan(), SparseMethod(Tiles(), ErrorAware(), policy, Centroid()))
        with found as refused:
            share_sequence(model, SequenceParallel(None, 0, 2))
    assert "policy.scope=layer: allowed is row or head with sequence_parallel=2" in str(refused)


def test_context_parallelism_of_diffusers_is_refused() -> None:
    model = attach(wan(), None)
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="enable_parallelism"):
        run(model, inputs())


@pytest.mark.parametrize("size", TRUE_SIZES)
def test_the_true_sizes_keep_every_key_and_shape(size: str) -> None:
    model = true_wan(size)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    heads, layers = (TRUE_SIZES[size][k] for k in ("num_attention_heads", "num_layers"))
    attach(model, sparse(layout=RowMajor()))
    assert list(attentions(model)) == [f"blocks.{i}.attn1" for i in range(layers)]
    state = model.state_dict()
    added = {
        f"blocks.{i}.attn1.processor.attention.policy.{n}" for i in range(layers) for n in "kp"
    }
    assert set(state) == set(shapes) | added
    assert all(state[name].shape == shape for name, shape in shapes.items())
    policy = {f"blocks.{i}.attn1.policy.{n}" for i in range(layers) for n in "kp"}
    masks = mask_state(model)
    assert set(masks) == policy
    assert all(tensor.shape == (heads,) for tensor in masks.values())
    detach(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("size", "pixels", "grid", "tokens", "blocks"),
    [
        ("1.3B", (81, 480, 832), TokenGrid(21, 30, 52), 32_760, (256, 512)),
        ("14B", (81, 720, 1280), TokenGrid(21, 45, 80), 75_600, (591, 1182)),
    ],
)
def test_the_true_sizes_see_the_published_token_grids(
    size: str, pixels: tuple[int, int, int], grid: TokenGrid, tokens: int, blocks: tuple[int, int]
) -> None:
    model, seen = attach(true_wan(size), None), []
    attentions(model)["blocks.0.attn1"].register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape, args[3]))
    )
    frames, height, width = (pixels[0] - 1) // 4 + 1, pixels[1] // 8, pixels[2] // 8
    call = {
        "hidden_states": torch.empty(1, 16, frames, height, width, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 512, 4096, device="meta"),
    }
    with torch.no_grad():
        assert run(model, call).shape == call["hidden_states"].shape
    heads = TRUE_SIZES[size]["num_attention_heads"]
    assert seen == [((1, heads, tokens, 128), grid)]
    assert grid.num_tokens == tokens and token_grid(model, call) == grid
    q_layout, kv_layout = RowMajor().build(grid)
    assert (q_layout.num_blocks, kv_layout.num_blocks) == blocks
    assert all(isinstance(a, DenseAttention) for a in attentions(model).values())
