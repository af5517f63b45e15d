"""Block errors, both backends, against the definition in fp64, key by key."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gossamer.kernels.block_error.op import KINDS, BlockErrors, block_error

both = pytest.mark.parametrize("backend", ["reference", "triton"])
kinds = pytest.mark.parametrize("kind", KINDS)


def _offsets(sizes: list[int], device: str) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int().to(device)


def _problem(device: str, num_q: int, sizes: list[int], dim: int, batch: int = 1) -> list[Tensor]:
    tokens = sum(sizes)
    shapes = ((num_q, dim), (tokens, dim), (tokens, dim))
    return [torch.randn(batch, 2, *shape, device=device) for shape in shapes]


def _exact(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, kind: str) -> BlockErrors:
    """The definitions, in fp64 with a shift of each row's logits that the results do not show."""
    q, k, v = q.double(), k.double(), v.double()
    scale, edges = q.shape[-1] ** -0.5, offsets.tolist()
    s = q @ k.transpose(-1, -2) * scale
    top = s.amax(-1, keepdim=True)
    spans = [slice(a, b) for a, b in pairwise(edges)]
    means = [(k[:, :, at].mean(2), v[:, :, at].mean(2)) for at in spans if at.start < at.stop]
    pooled = torch.stack([(q @ m[..., None]).squeeze(-1) * scale for m, _ in means], -1)
    log_n = torch.tensor([b.stop - b.start for b in spans if b.start < b.stop]).double().log()
    center = (pooled + log_n.to(q.device)).softmax(-1) @ torch.stack([m for _, m in means], 2)
    z = (s - top).exp().sum(-1)
    errors, masses, column = [], [], 0
    for at in spans:
        if at.start == at.stop:
            errors.append(torch.zeros_like(z))
            masses.append(torch.zeros_like(z))
            continue
        weight = (s[..., at] - top).exp()
        mean = (pooled[..., column, None] - top).exp()
        here = v[:, :, at]
        if kind == "output":
            moved = weight @ here - weight.sum(-1, keepdim=True) * center
            stands = weight.shape[-1] * mean * (here.mean(2, keepdim=True) - center)
            errors.append((moved - stands).square().sum(-1) / z.square())
        else:
            change = weight[..., None] * here[:, :, None] - (
                mean[..., None] * here.mean(2, keepdim=True)[:, :, None]
            )
            errors.append(change.square().sum((-1, -2)) * (2 * top.squeeze(-1)).exp())
        masses.append(weight.sum(-1) / z)
        column += 1
    return BlockErrors(torch.stack(errors, -1).log(), torch.stack(masses, -1).log())


@both
@kinds
@pytest.mark.parametrize(
    ("num_q", "sizes", "dim"),
    [(5, [3, 7, 1, 9], 16), (1, [4], 32), (20, [0, 40, 2, 0, 33], 16), (40, [70, 5], 16)],
)
def test_errors_and_masses_follow_their_definition(
    device: str, num_q: int, sizes: list[int], dim: int, kind: str, backend: str
) -> None:
    q, k, v = _problem(device, num_q, sizes, dim)
    offsets = _offsets(sizes, device)
    found = block_error(q, k, v, offsets, max(sizes), kind=kind, backend=backend)
    expected = _exact(q, k, v, offsets, kind)
    size = offsets.diff()
    torch.testing.assert_close(found.log_mass.double(), expected.log_mass, rtol=1e-5, atol=2e-5)
    real = size > 1  # one token is its own mean: error 0, or what rounding leaves of it
    torch.testing.assert_close(
        found.log_error[..., real].double(), expected.log_error[..., real], rtol=0, atol=2e-3
    )
    assert (found.log_error[..., size == 0] == -torch.inf).all()
    assert (found.log_error[..., size == 1] < expected.log_error[..., real].min() - 9).all()


@both
@kinds
def test_logits_of_sixty_neither_overflow_nor_tie(device: str, kind: str, backend: str) -> None:
    sizes = [8] * 6
    q, k, v = _problem(device, 4, sizes, 16)
    q = q[:, :, :1] * torch.tensor([1.0, -1.0, 1.5, -1.5], device=device)[:, None]
    k = k * 60 / (q @ k.transpose(-1, -2) / 4).abs().amax(-1, keepdim=True).amin(-2, keepdim=True)
    offsets = _offsets(sizes, device)
    assert (q @ k.transpose(-1, -2) / 4).amax() > 60 > -60 > (q @ k.transpose(-1, -2) / 4).amin()
    found = block_error(q, k, v, offsets, 8, kind=kind, backend=backend)
    expected = _exact(q, k, v, offsets, kind)
    torch.testing.assert_close(found.log_error.double(), expected.log_error, rtol=0, atol=5e-3)
    assert torch.equal(found.log_error.argsort(-1), expected.log_error.argsort(-1))


@both
@pytest.mark.parametrize(("kind", "smallest"), [("keys", 1e-4), ("output", 8e-3)])
def test_small_errors_keep_their_order(
    device: str, kind: str, smallest: float, backend: str
) -> None:
    # Keys close to their mean: the released expansion A2 - 2 A1 + ... loses these to rounding.
    offsets = _offsets([8] * 5, device)
    q, k, v = _problem(device, 3, [8] * 5, 16)
    size = smallest * 2 ** torch.arange(5, device=device).repeat_interleave(8)
    centers = torch.randn(1, 2, 5, 16, device=device).repeat_interleave(8, 2)
    k, v = centers + k * size[:, None], centers.flip(-1) + v * size[:, None]
    found = block_error(q, k, v, offsets, 8, kind=kind, backend=backend).log_error
    expected = _exact(q, k, v, offsets, kind).log_error
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-2)


@both
@kinds
def test_each_head_has_blocks_of_its_own(device: str, kind: str, backend: str) -> None:
    q, k, v = _problem(device, 6, [24], 16, batch=2)
    inner = torch.randint(0, 25, (2, 2, 4)).sort(-1).values
    ends = [inner.new_full((2, 2, 1), end) for end in (0, 24)]
    offsets = torch.cat([ends[0], inner, ends[1]], -1).int().to(device)
    found = block_error(q, k, v, offsets, 24, kind=kind, backend=backend)
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        one = (slice(at[0], at[0] + 1), slice(at[1], at[1] + 1))
        alone = block_error(q[one], k[one], v[one], offsets[at], 24, kind=kind, backend=backend)
        for together, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(together[one].exp(), expected.exp(), rtol=1e-4, atol=1e-9)


@both
def test_the_same_every_time_and_for_any_strides(device: str, backend: str) -> None:
    q, k, v = _problem(device, 7, [5, 9, 11], 16)
    offsets = _offsets([5, 9, 11], device)
    found = block_error(q, k, v, offsets, 11, backend=backend)
    stored = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for one, other in zip(found, block_error(*stored, offsets, 11, backend=backend), strict=True):
        assert torch.equal(one, other)
    assert found.log_mass.exp().sum(-1).allclose(torch.ones(1, device=device))


def test_half_precision_keeps_the_ranking(device: str) -> None:
    q, k, v = _problem(device, 16, [16] * 8, 32)
    offsets = _offsets([16] * 8, device)
    k, v = k.half(), v.half()
    found = block_error(q, k, v, offsets, 16, backend="triton").log_error
    expected = _exact(q.half(), k, v, offsets, "output").log_error
    assert (found - expected).abs().max() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "values"}, "kind must be one of"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
        ({"q_mean": torch.zeros(1, 2, 3, 8)}, "q_mean their batch, heads and dims"),
        ({"k": torch.zeros(2, 12, 16)}, "k must be a non-empty"),
        ({"kv_offsets": torch.tensor([0, 5, 11])}, "kv_offsets must rise from 0 to the 12 tokens"),
    ],
)
def test_refusals_name_the_field(change: dict, message: str) -> None:
    k = torch.randn(1, 2, 12, 16)
    arguments = {
        "q_mean": torch.randn(1, 2, 3, 16), "k": k, "v": torch.randn_like(k),
        "kv_offsets": torch.tensor([0, 5, 12]), "kv_block_size": 7, "kind": "output",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_error(**{**arguments, **change}, backend="reference")


@both
@kinds
def test_autocast_changes_nothing(device: str, kind: str, backend: str) -> None:
    q, k, v = _problem(device, 20, [5, 40, 2], 16)
    offsets = _offsets([5, 40, 2], device)
    expected = block_error(q, k, v, offsets, 40, kind=kind, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = block_error(q, k, v, offsets, 40, kind=kind, backend=backend)
    assert all(map(torch.equal, found, expected))
