"""Guarded dense attention: SDPA's numbers, and a gradient laid out as its backward expects."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.kernels.dense_attention.op import dense_attention


def _inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [B, H, S, D] as views of [B, S, H, D], and a contiguous gradient."""
    q, k, v = (torch.randn(2, 96, 4, 64, device=device, dtype=dtype) for _ in range(3))
    grad = torch.randn(2, 4, 96, 64, device=device, dtype=dtype)
    return [*(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), grad]


def test_dense_attention_equals_sdpa_with_its_gradients() -> None:
    q, k, v, grad = _inputs()
    for scale in (None, 0.3):
        out, plain = (
            dense_attention(q, k, v, scale=scale),
            F.scaled_dot_product_attention(q, k, v, scale=scale),
        )
        assert torch.equal(out, plain)
        actual, expected = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, plain))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(actual, expected, strict=True))


def test_sdpa_sees_a_gradient_with_the_strides_of_its_output() -> None:
    q, k, v, grad = _inputs()
    out = dense_attention(q, k, v)
    seen = []
    sdpa = out.grad_fn.next_functions[0][0]
    sdpa.register_prehook(lambda gradients: seen.append(gradients[0]))
    out.backward(grad)
    assert grad.stride() != out.stride() and seen[0].stride() == out.stride()
    assert torch.equal(seen[0], grad)


def test_a_gradient_that_fits_is_passed_on_without_a_copy() -> None:
    q, k, v, _ = _inputs()
    out = dense_attention(q, k, v)
    seen = []
    out.grad_fn.next_functions[0][0].register_prehook(lambda grads: seen.append(grads[0]))
    grad = torch.empty_like(out).normal_()
    out.backward(grad)
    assert seen[0].data_ptr() == grad.data_ptr()


def _cudnn_gradients(attend, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    *leaves, grad = inputs
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.autograd.grad(attend(*leaves), leaves, grad)


def _error(actual: tuple[Tensor, ...], inputs: list[Tensor]) -> float:
    *leaves, grad = (x.detach().double() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(actual, exact, strict=True))


@pytest.mark.gpu
def test_cudnn_gradients_are_right_whatever_the_layout_of_the_gradient() -> None:
    inputs = _inputs("cuda", torch.bfloat16)
    assert _error(_cudnn_gradients(dense_attention, *inputs), inputs) < 0.01


@pytest.mark.gpu
def test_cudnn_gradients_are_wrong_without_the_guard() -> None:
    inputs = _inputs("cuda", torch.bfloat16)
    error = _error(_cudnn_gradients(F.scaled_dot_product_attention, *inputs), inputs)
    if error < 0.01:
        pytest.xfail(f"torch {torch.__version__} reads the gradient's layout: the guard can go")
    assert error > 0.1
