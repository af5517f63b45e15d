"""The density controller: budgets move between heads, the mean density does not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_wan
from torch import Tensor, nn

from gossamer.sparse.attach import attach, attentions, mask_parameters
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Drop
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor
from gossamer.sparse.policies import Hybrid, TrainedHybrid
from gossamer.train.density_controller import DensityController
from gossamer.train.loop import mean_density

pytest.importorskip("diffusers")
ALONE = SimpleNamespace(reduce=lambda x, how: x)


def student(policy: Hybrid) -> nn.Module:
    model = tiny_wan(num_attention_heads=4)
    method = SparseMethod(RowMajor(q_block=4, kv_block=2), MeanPool(), policy, Drop())
    return attach(model, method).train()


def run(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(
        hidden_states=torch.randn(1, 4, 4, 16, 8, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16, generator=generator),
        return_dict=False,
    )[0]


def shifts(model: nn.Module) -> list[nn.Parameter]:
    return list(mask_parameters(model).values())


def give_gradients(model: nn.Module, wish: Tensor, step: int = 0) -> None:
    """Give every head a noisy gradient towards more blocks, of a size of its own."""
    wish = wish * (1 + 0.5 * torch.randn(2, 4, generator=torch.Generator().manual_seed(step)))
    for layer, attention in enumerate(attentions(model).values()):
        for shift in (attention.policy.k_shift, attention.policy.p_shift):
            shift.grad = -wish[layer] * shift.detach().new_ones(4)


@pytest.mark.parametrize("budget", [(0.25, 0.0), (0.1, 0.4), (0.0, 0.4)])
@pytest.mark.parametrize("controlled", [True, False])
def test_the_density_stays_while_budgets_part(
    budget: tuple[float, float], controlled: bool
) -> None:
    model = student(TrainedHybrid(k=budget[0], p=budget[1]))
    run(model, 0)
    target = mean_density(model)
    controller = DensityController(model, target, ALONE)
    optimizer = torch.optim.Adam(shifts(model), lr=0.02)
    wish = torch.linspace(0.5, 4, 8).view(2, 4)
    densities = []
    for step in range(40):
        run(model, 0)
        densities.append(mean_density(model))
        give_gradients(model, wish, step)
        if controlled:
            controller.before_step()
        optimizer.step()
        if controlled:
            controller.after_step()
    off = max(abs(d - target) for d in densities)
    per_head = torch.stack([a.mask.density[0] for a in attentions(model).values()])
    if controlled:
        assert off < 0.005 and per_head.max() > 1.3 * per_head.min()
        assert per_head[1].mean() > 1.2 * per_head[0].mean()  # the heads that gain more
    else:
        assert off > 0.03


def test_the_price_parts_the_heads_into_halves_of_equal_weight() -> None:
    model = student(TrainedHybrid(k=0.1, p=0.4))
    run(model, 0)
    controller = DensityController(model, 0.2, ALONE)
    slope = torch.cat(
        [a.policy.density_slope(a.band, a.mask).flatten() / 8 for a in attentions(model).values()]
    )
    for shift, part in zip(shifts(model), slope.split(4), strict=True):
        shift.grad = -3 * part
    assert controller.before_step()["density_price"] == pytest.approx(3, rel=1e-5)
    assert max(float(s.grad.abs().max()) for s in shifts(model)) < 1e-6
    wish = torch.rand(2, 4)
    wish[0, 0] = 1e4  # one head does not set the price for all others
    give_gradients(model, wish)
    controller.before_step()
    left = torch.cat([shift.grad for shift in shifts(model)])
    grow, shrink = slope[left < -1e-6].sum(), slope[left > 1e-6].sum()
    largest = slope.max()
    assert abs(grow - shrink) <= largest and slope.sum() > 3 * largest


def test_a_start_off_the_target_is_brought_there_in_small_moves() -> None:
    model = student(TrainedHybrid(k=0.25))
    controller = DensityController(model, 0.3, ALONE)
    for step in range(30):
        run(model, 0)
        give_gradients(model, torch.zeros(2, 4))
        before = [shift.detach().clone() for shift in shifts(model)]
        controller.before_step()
        controller.after_step()
        moved = max(
            float((a - b).detach().abs().max()) for a, b in zip(shifts(model), before, strict=True)
        )
        assert moved <= 0.05 + 1e-6, step
    run(model, 0)
    # All heads have one budget here, so that the density moves by 1 / 64 at a time.
    assert mean_density(model) == pytest.approx(0.3, abs=1 / 64)


def test_its_state_goes_on_where_it_was() -> None:
    model = student(TrainedHybrid(k=0.1, p=0.4))
    first, second = (DensityController(model, 0.2, ALONE) for _ in range(2))
    run(model, 0)
    give_gradients(model, torch.ones(2, 4))
    first.before_step()
    first.after_step()
    assert first.state != second.state
    second.load_state(first.state)
    assert first.state == second.state


def test_budgets_that_do_not_train_are_left_alone() -> None:
    model = student(Hybrid(k=0.1))
    run(model, 0)
    controller = DensityController(model, 0.5, ALONE)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert controller.before_step() == {}
    controller.after_step()
    after: dict[str, Any] = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
