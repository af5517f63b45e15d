"""Quantised attention in bf16 on a GPU: both compiled backends against the emulation."""

from collections.abc import Callable

import pytest
import torch

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.quantized_attention.op import quantized_block_sparse_attention

pytestmark = pytest.mark.gpu


def _backends() -> list[str]:
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["triton", "hopper"] if is_hopper else ["triton"]


def _uniform(blocks: Blocks) -> Blocks:
    return Blocks(**(vars(blocks) | {"is_uniform": True}))


@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("q_sizes", "kv_sizes"),
    [
        ([128, 128, 44], [128, 128, 128, 1]),
        ([128, 5], [64] * 7 + [9]),
        ([64, 64, 63], [64, 64, 2]),
        ([64, 1], [128, 127]),
    ],
)
def test_a_compiled_backend_equals_the_emulation_and_itself(
    make_blocks: Callable,
    poisoned_empty: None,
    q_sizes: list[int],
    kv_sizes: list[int],
    head_dim: int,
    qk: str,
    backend: str,
) -> None:
    blocks = _uniform(make_blocks(q_sizes, kv_sizes, batch=2, heads=3))
    q, k, v = (
        torch.randn(2, 3, sum(sizes), head_dim, device="cuda", dtype=torch.bfloat16)
        for sizes in (q_sizes, kv_sizes, kv_sizes)
    )
    expected, expected_lse = quantized_block_sparse_attention(q, k + 3, v, blocks, qk=qk)
    results = [
        quantized_block_sparse_attention(q, k + 3, v, blocks, qk=qk, backend=backend)
        for _ in range(5)
    ]
    out, lse = results[0]
    assert (out - expected).float().norm() <= 0.01 * expected.float().norm()
    _, exact_lse = block_sparse_attention(q.double(), (k + 3).double(), v.double(), blocks)
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    # An int8 may round the other way, so agreement is measured by the error of quantising.
    own_error = (expected_lse - exact_lse)[seen].norm()
    assert (lse - expected_lse)[seen].norm() <= 0.5 * own_error + 1e-5
    for other in results[1:]:
        assert torch.equal(other[0], out) and torch.equal(other[1], lse)
