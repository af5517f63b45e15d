"""Random attention problems, the dense formula they are judged by, and the fp64 yardstick."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gossamer.kernels.blocks import Blocks

Attend = Callable[[Tensor, Tensor, Tensor, Blocks], tuple[Tensor, Tensor]]
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    grad_out: Tensor
    grad_lse: Tensor

    def run(self, attend: Attend, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return out, lse and the gradients of attend on inputs converted to dtype."""
        leaves = [
            x.detach().to(dtype, copy=True).requires_grad_() for x in (self.q, self.k, self.v)
        ]
        out, lse = attend(*leaves, self.blocks)
        torch.autograd.backward((out, lse), (self.grad_out.to(out), self.grad_lse.to(lse)))
        results = (out.detach(), lse.detach(), *(x.grad for x in leaves))
        return dict(zip(NAMES, results, strict=True))


def _random_selected(
    batch: int, heads: int, rows: int, columns: int, density: float, seed: int
) -> Tensor:
    """Random blocks in which head 0 has an empty row and an unselected column."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.rand(batch, heads, rows, columns, generator=generator) < density
    selected[:, -1, -1, -1] = True
    if heads > 1:
        selected[:, 0, 0] = False
        selected[:, 0, :, -1] = False
    return selected


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where the kernels run: natively on a GPU, else in the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def make_blocks(device: str) -> Callable[..., Blocks]:
    """Blocks of given sizes; selected is random unless given."""

    def make(
        q_sizes: list[int],
        kv_sizes: list[int],
        *,
        selected: Tensor | None = None,
        batch: int = 1,
        heads: int = 2,
        density: float = 0.5,
        seed: int = 0,
    ) -> Blocks:
        if selected is None:
            selected = _random_selected(batch, heads, len(q_sizes), len(kv_sizes), density, seed)
        return Blocks.from_selected(
            selected.to(device),
            _offsets(q_sizes).to(device),
            _offsets(kv_sizes).to(device),
            max(q_sizes),
            max(kv_sizes),
            is_uniform=all(set(sizes[:-1]) <= {max(sizes)} for sizes in (q_sizes, kv_sizes)),
        )

    return make


@pytest.fixture
def make_problem(device: str, make_blocks: Callable[..., Blocks]) -> Callable[..., Problem]:
    """Random tensors, exact in dtype, over blocks of given sizes; the rest goes to make_blocks."""

    def make(
        q_sizes: list[int],
        kv_sizes: list[int],
        *,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        **kwargs: object,
    ) -> Problem:
        blocks = make_blocks(q_sizes, kv_sizes, **kwargs)
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*blocks.kv_num_blocks.shape[:2], *shape, generator=generator).to(
                device, dtype
            )

        num_q, num_kv = sum(q_sizes), sum(kv_sizes)
        q, grad_out = normal(num_q, head_dim), normal(num_q, head_dim)
        k, v = normal(num_kv, head_dim), normal(num_kv, head_dim)
        return Problem(q, k, v, blocks, grad_out, normal(num_q).float())

    return make


@pytest.fixture
def dense_formula() -> Attend:
    """Masked softmax attention in the inputs' own type: formula and low-precision yardstick."""

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        allowed = blocks.selected().repeat_interleave(blocks.q_offsets.diff(), 2)
        allowed = allowed.repeat_interleave(blocks.kv_offsets.diff(), 3)
        logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
        peak = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
        weight = torch.exp(logits - peak)
        total = weight.sum(-1, keepdim=True)
        empty = total == 0
        lse = (peak + total.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
        return weight / total.masked_fill(empty, 1) @ v, lse.squeeze(-1)

    return attend


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """Assert that each result is at most twice as far from fp64 as plain low-precision PyTorch."""

    def check(
        actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], eps: float
    ) -> None:
        floor = 4 * eps * max(x[x.isfinite()].norm().item() for x in exact.values())
        for name, truth in exact.items():
            finite = truth.isfinite()
            assert torch.equal(actual[name].isfinite(), finite), name
            error, allowed = (
                (x[name].double() - truth)[finite].norm().item() for x in (actual, plain)
            )
            assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, plain {allowed:.2e}"

    return check
