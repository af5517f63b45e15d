"""Merging two attentions gives the attention over the keys of both."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.merge import merge


def _part(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def test_two_halves_merge_into_attention_over_all_keys() -> None:
    logits = 5 * torch.randn(2, 3, 4, 10, dtype=torch.float64)
    value = torch.randn(2, 3, 10, 6, dtype=torch.float64)
    merged = merge(
        *_part(logits[..., :3], value[..., :3, :]), *_part(logits[..., 3:], value[..., 3:, :])
    )
    for actual, expected in zip(merged, _part(logits, value), strict=True):
        torch.testing.assert_close(actual, expected)


def test_merge_passes_gradcheck_also_through_the_lse() -> None:
    shapes = [(1, 2, 3, 4), (1, 2, 3)] * 2
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(merge, inputs)


def test_an_empty_part_changes_no_bit_and_gets_no_gradient() -> None:
    out, lse = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    empty = torch.zeros(1, 2, 3, 4, requires_grad=True)
    nothing = torch.full((1, 2, 3), -torch.inf, requires_grad=True)
    merged_out, merged_lse = merge(empty, nothing, out, lse)
    assert torch.equal(merged_out, out) and torch.equal(merged_lse, lse)
    (merged_out.square().sum() + merged_lse.sum()).backward()
    assert empty.grad.eq(0).all() and nothing.grad.eq(0).all()
    torch.testing.assert_close(out.grad, 2 * out.detach())
    torch.testing.assert_close(lse.grad, torch.ones_like(lse))


def test_two_empty_parts_give_zero_and_zero_gradient_without_nan() -> None:
    parts = [torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf)] * 2
    parts = [x.clone().requires_grad_() for x in parts]
    out, lse = merge(*parts)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(x.grad.eq(0).all() for x in parts)


def test_far_apart_lse_stay_finite() -> None:
    out = torch.randn(1, 1, 2, 4)
    lse = torch.tensor([[[1e4, -1e4]]])
    merged_out, merged_lse = merge(out, lse, -out, -lse)
    torch.testing.assert_close(merged_out, out * torch.tensor([1.0, -1.0])[:, None])
    torch.testing.assert_close(merged_lse, torch.full((1, 1, 2), 1e4))


def test_half_outputs_are_rounded_once() -> None:
    outs = [torch.randn(1, 2, 8, 4).to(torch.bfloat16) for _ in range(2)]
    lses = [torch.randn(1, 2, 8) for _ in range(2)]
    merged, _ = merge(outs[0], lses[0], outs[1], lses[1])
    exact, _ = merge(outs[0].double(), lses[0].double(), outs[1].double(), lses[1].double())
    torch.testing.assert_close(merged, exact.to(torch.bfloat16), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 2, 4), torch.float32, "must have one shape"), ((1, 2, 3), torch.half, "do not round")],
)
def test_parts_that_do_not_belong_together_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    out = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        merge(out, torch.zeros(1, 2, 3), out, torch.zeros(shape, dtype=dtype))
