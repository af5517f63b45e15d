"""What block-sparse attention refuses: each message names field, value and the fix."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention, choose_backend

SUPPORTED = {
    "head_dim": 64,
    "dtype": torch.float32,
    "device": "cpu",
    "q_block_size": 128,
    "kv_block_size": 64,
    "is_uniform": True,
}


def _attend(problem, **changes: object) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "blocks": problem.blocks}
    return block_sparse_attention(**(tensors | changes))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], r"q must be a non-empty \[B, H, S, D\] tensor, got shape"),
        ("k", lambda x: x[:, :, :0], "k must be a non-empty"),
        ("k", lambda x: x.half(), "k must have q's dtype and device.*got torch.float16"),
        ("v", lambda x: x[:, :, 1:], "k and v must have one shape"),
        ("k", lambda x: x[:, :1], "k and v must have one shape"),
        ("q", lambda x: x[:, :, 1:], "blocks.q_offsets must rise from 0 to the 7 tokens"),
        ("blocks", lambda x: replace(x, kv_block_size=3), "at most block_size 3"),
        (
            "blocks",
            lambda x: replace(x, q_indices=x.q_indices[:, :1]),
            r"blocks.q_indices must be int32 \[1, 2, 3, 2\].*Blocks.from_selected",
        ),
        (
            "blocks",
            lambda x: replace(x, kv_num_blocks=x.kv_num_blocks.long()),
            "blocks.kv_num_blocks must be int32",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="offsets are looked at on the CPU only")
def test_tensors_that_do_not_belong_together_are_refused(
    make_problem: Callable, name: str, change: Callable, message: str
) -> None:
    problem = make_problem([4, 4], [4, 4, 2])
    with pytest.raises(ValueError, match=message):
        _attend(problem, **{name: change(getattr(problem, name))})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(
    make_problem: Callable, scale: float
) -> None:
    with pytest.raises(ValueError, match="scale must be finite and > 0"):
        _attend(make_problem([4], [4]), scale=scale)


def test_integer_inputs_are_refused(make_problem: Callable) -> None:
    problem = make_problem([4], [4])
    with pytest.raises(ValueError, match=r"q must be floating point, got torch.int64"):
        _attend(problem, q=problem.q.long(), k=problem.k.long(), v=problem.v.long())


def test_an_unknown_backend_is_refused(make_problem: Callable) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'; use 'auto'"):
        _attend(make_problem([4], [4]), backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, r"head dim must be one of \(16, 32, 64, 128\).*got 48"),
        ({"head_dim": 256}, "got 256; use backend='reference'"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16.*got torch.float64"),
        ({"dtype": torch.int32}, "dtype must be float32, float16, bfloat16 or float64"),
    ],
)
def test_choose_backend_names_what_triton_cannot_run(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", **(SUPPORTED | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 32}, "head dim must be 64 or 128, got 32, for backend 'hopper'; use"),
        ({"dtype": torch.float32}, "dtype must be float16 or bfloat16, got torch.float32"),
        ({"q_block_size": 32}, "q_block_size must be 64 or 128 tokens, got 32"),
        ({"is_uniform": False}, "blocks must all be full but the last"),
        ({}, "device must be an H100, H200 or other GPU of capability 9.0, got cpu"),
    ],
)
def test_choose_backend_names_what_hopper_cannot_run(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend("hopper", **(SUPPORTED | {"dtype": torch.bfloat16} | change))


def test_triton_takes_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    changes = {"q_block_size": 75_600, "kv_block_size": 129, "is_uniform": False}
    assert choose_backend("triton", **(SUPPORTED | changes)) == "triton"


def test_auto_is_the_reference_on_a_cpu() -> None:
    assert choose_backend("auto", **SUPPORTED) == "reference"


@pytest.mark.parametrize("head_dim", [8, 48, 80, 256])
def test_the_reference_takes_any_head_dim_block_size_and_float_type(head_dim: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        changes = {"head_dim": head_dim, "dtype": dtype, "q_block_size": 500}
        choose_backend("reference", **(SUPPORTED | changes))


def test_bf16_is_refused_in_the_interpreter(
    make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"under TRITON_INTERPRET=1, got torch.bfloat16"):
        _attend(make_problem([16], [16], dtype=torch.bfloat16), backend="triton")


def test_triton_on_a_cpu_without_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"device must be cuda.*got cpu.*TRITON_INTERPRET=1"):
        choose_backend("triton", **SUPPORTED)


def test_a_machine_without_triton_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed; pip"):
        choose_backend("triton", **SUPPORTED)
