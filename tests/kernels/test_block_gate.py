"""The gate gradient against finite differences of attention whose blocks are blended by gates."""

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_gate import reference
from gossamer.kernels.block_gate.op import block_gate
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention

Q_SIZES, KV_SIZES = [4, 1, 4, 3], [3, 2, 3, 0, 3, 1]
HEADS = 2


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": sum(Q_SIZES), "k": sum(KV_SIZES), "v": sum(KV_SIZES), "grad": sum(Q_SIZES)}
    tensors = {
        name: torch.randn(2, HEADS, tokens, 4, generator=generator, dtype=dtype)
        for name, tokens in shapes.items()
    }
    tensors["log_gate"] = torch.randn(HEADS, generator=generator, dtype=dtype)
    shape = (2, HEADS, len(Q_SIZES), len(KV_SIZES))
    selected = torch.rand(shape, generator=generator) < 0.4
    selected[..., 0] |= ~selected[..., torch.tensor(KV_SIZES) > 0].any(-1)  # sees some token
    return {**tensors, "selected": selected}


def blocks_of(selected: Tensor) -> Blocks:
    q_offsets, kv_offsets = (
        torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (Q_SIZES, KV_SIZES)
    )
    return Blocks.from_selected(selected, q_offsets, kv_offsets, max(Q_SIZES), max(KV_SIZES))


def blended(x: dict[str, Tensor], gate: Tensor, centroids: bool, scale: float) -> Tensor:
    """Return the output when each token counts gate times and its centroid 1 - gate times."""
    q_block = torch.repeat_interleave(torch.tensor(Q_SIZES))
    kv_block = torch.repeat_interleave(torch.tensor(KV_SIZES))
    per_token = gate[:, :, q_block]  # [B, H, Sq, Nk]
    exact = (x["q"] @ x["k"].transpose(-1, -2) * scale).exp() * per_token[..., kv_block]
    total, norm = exact @ x["v"], exact.sum(-1, keepdim=True)
    if centroids:
        for c, size in enumerate(KV_SIZES):
            if size:
                inside = kv_block == c
                k_mean, v_mean = (x[n][:, :, inside].mean(2, keepdim=True) for n in "kv")
                logit = x["q"] @ k_mean.transpose(-1, -2) * scale + x["log_gate"][:, None, None]
                weight = size * logit.exp() * (1 - per_token[..., c : c + 1])
                total, norm = total + weight * v_mean, norm + weight
    return total / norm


def attend(x: dict[str, Tensor], centroids: bool, scale: float) -> tuple[Tensor, Tensor, Blocks]:
    blocks = blocks_of(x["selected"])
    q, k, v = x["q"], x["k"], x["v"]
    if centroids:
        out = compensated_attention(q, k, v, blocks, gate=x["log_gate"], scale=scale)
    else:
        out = block_sparse_attention(q, k, v, blocks, scale=scale)
    return *out, blocks


def gate_gradient(x: dict[str, Tensor], centroids: bool, scale: float = 0.7) -> Tensor:
    """Return the op's gradient for every pair of blocks."""
    out, lse, blocks = attend(x, centroids, scale)
    column = torch.arange(len(KV_SIZES)).expand(x["selected"].shape).contiguous()
    gate = torch.zeros(column.shape, dtype=torch.float64, requires_grad=True)
    same = block_gate(
        out,
        lse,
        x["q"],
        x["k"],
        x["v"],
        gate,
        column,
        blocks,
        centroids=centroids,
        column_gate=x["log_gate"] if centroids else None,
        scale=scale,
    )
    assert torch.equal(same, out)
    return torch.autograd.grad((same * x["grad"]).sum(), gate)[0]


@pytest.mark.parametrize("centroids", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_slope_of_blended_attention(centroids: bool, seed: int) -> None:
    x = problem(seed)
    found = gate_gradient(x, centroids)
    gate, eps = x["selected"].double(), 1e-6
    torch.testing.assert_close(attend(x, centroids, 0.7)[0], blended(x, gate, centroids, 0.7))
    expected = torch.zeros_like(gate)
    for c in range(len(KV_SIZES)):  # all rows at once: they do not act on each other
        change = torch.zeros_like(gate)
        change[..., c] = eps
        ends = (blended(x, gate + s * change, centroids, 0.7) for s in (1, -1))
        up, down = ((out * x["grad"]).sum(-1).split(Q_SIZES, -1) for out in ends)
        slope = [(u - d).sum(-1) / (2 * eps) for u, d in zip(up, down, strict=True)]
        expected[..., c] = torch.stack(slope, -1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("centroids", [False, True])
def test_each_head_may_have_blocks_of_its_own(centroids: bool) -> None:
    x = problem()
    other = torch.tensor([[0, 1, 4, 4, 9, 10, 12], [0, 3, 5, 8, 8, 11, 12]]).int()
    offsets = torch.stack([other, other.flip(0)])  # [B, H, Nk + 1]

    def gradient(at: tuple[slice, slice], kv_offsets: Tensor) -> Tensor:
        blocks = Blocks.from_selected(
            x["selected"][at], blocks_of(x["selected"]).q_offsets, kv_offsets, 4, 5
        )
        q, k, v, grad = (x[name][at] for name in ("q", "k", "v", "grad"))
        log_gate = x["log_gate"][at[1]] if centroids else None
        if centroids:
            out, lse = compensated_attention(q, k, v, blocks, gate=log_gate)
        else:
            out, lse = block_sparse_attention(q, k, v, blocks)
        column = torch.arange(len(KV_SIZES)).expand(x["selected"][at].shape).contiguous()
        gate = torch.zeros(column.shape, dtype=torch.float64, requires_grad=True)
        same = block_gate(
            out, lse, q, k, v, gate, column, blocks, centroids=centroids, column_gate=log_gate
        )
        return torch.autograd.grad((same * grad).sum(), gate)[0]

    together = gradient((slice(None), slice(None)), offsets)
    for b in range(2):
        for h in range(HEADS):
            alone = gradient((slice(b, b + 1), slice(h, h + 1)), offsets[b, h])
            torch.testing.assert_close(together[b : b + 1, h : h + 1], alone)


@pytest.mark.parametrize("centroids", [False, True])
def test_pieces_give_the_same_as_the_whole(
    centroids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = problem()
    whole = gate_gradient(x, centroids)
    monkeypatch.setattr(reference, "_MAX_ELEMENTS_CPU", 1)
    torch.testing.assert_close(gate_gradient(x, centroids), whole, rtol=1e-12, atol=1e-14)


def test_the_output_gradient_passes_and_q_k_and_v_get_nothing_twice() -> None:
    x = problem()
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse, blocks = attend(x, True, 0.5)
    expected = torch.autograd.grad((out * x["grad"]).sum(), leaves, retain_graph=True)
    column = torch.zeros(2, HEADS, len(Q_SIZES), 1, dtype=torch.long)
    gate = torch.zeros(column.shape, requires_grad=True)
    same = block_gate(out, lse, *leaves, gate, column, blocks, centroids=True, scale=0.5)
    found = torch.autograd.grad((same * x["grad"]).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_left_out_block_that_outweighs_all_others_gives_a_finite_gradient() -> None:
    x = problem(dtype=torch.float32)
    x["q"], x["k"] = 60 * x["q"], 60 * x["k"]
    for centroids in (False, True):
        assert gate_gradient(x, centroids).isfinite().all()


def test_it_survives_torch_compile() -> None:
    x = problem(dtype=torch.float32)
    out, lse, blocks = attend(x, False, 0.5)
    column = torch.zeros(2, HEADS, len(Q_SIZES), 1, dtype=torch.long)

    def loss(gate: Tensor, out: Tensor) -> Tensor:
        same = block_gate(
            out, lse, x["q"], x["k"], x["v"], gate, column, blocks, centroids=False, scale=0.5
        )
        return (same * x["grad"]).sum()

    found = []
    for call in (loss, torch.compile(loss, backend="aot_eager")):
        gate = torch.zeros(column.shape, requires_grad=True)
        source = out.detach().clone().requires_grad_()
        found.append(torch.autograd.grad(call(gate, source * 1), [gate, source]))
    assert found[0][0].abs().min() > 0
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"column": torch.zeros(2, HEADS, 4, 1)}, "column must be int64"),
        ({"column": torch.zeros(2, HEADS, 3, 1, dtype=torch.long)}, "column must be int64"),
        ({"gate": torch.zeros(2, HEADS, 4, 2)}, "gate must be floating point of column's shape"),
        ({"lse": torch.zeros(2, HEADS, 1)}, "out and lse must be"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Tensor], said: str) -> None:
    x = problem()
    out, lse, blocks = attend(x, False, 0.5)
    given = {
        "lse": lse,
        "gate": torch.zeros(2, HEADS, 4, 1),
        "column": torch.zeros(2, HEADS, 4, 1, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=said):
        block_gate(
            out, q=x["q"], k=x["k"], v=x["v"], blocks=blocks, centroids=False, scale=0.5, **given
        )
