"""Several forwards before their backwards: each recompute of checkpointing finds its own masks."""

import gc
from functools import partial
from weakref import ref

import pytest
import torch
from tiny import tiny_wan
from torch.utils.checkpoint import checkpoint

from gossamer.sparse.attach import attach, attentions
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor
from gossamer.sparse.policies import TrainedHybrid

pytest.importorskip("diffusers")


def student(reentrant=None):
    policy = TrainedHybrid(k=0.3)
    method = SparseMethod(RowMajor(q_block=16, kv_block=8), MeanPool(), policy, Centroid())
    model = attach(tiny_wan().train(), method, dense_steps=1)
    if reentrant is not None:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
    return model


def loss(model, seed, step=1):
    generator = torch.Generator().manual_seed(seed)
    with model.cache_context("cond", step_index=step):
        out = model(
            hidden_states=torch.randn(2, 4, 3, 8, 8, generator=generator),
            timestep=torch.tensor([900.0, 100.0]) - step,
            encoder_hidden_states=torch.randn(2, 7, 16, generator=generator),
            return_dict=False,
        )[0]
    return out.square().sum()


def together(model):
    (loss(model, 1) + loss(model, 2)).backward()


def in_turn(model):
    first, second = loss(model, 1), loss(model, 2)
    first.backward()
    second.backward()


def with_a_look_between(model):
    first = loss(model, 1)
    with torch.no_grad():
        loss(model, 3)
    first.backward()
    loss(model, 2).backward()


def with_a_dense_step(model):
    (loss(model, 1, step=0) + loss(model, 2, step=1)).backward()


def gradients(model, backward):
    backward(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", [together, in_turn, with_a_look_between, with_a_dense_step])
def test_the_gradients_are_those_without_checkpointing(backward, reentrant):
    expected = gradients(student(), backward)
    found = gradients(student(reentrant), backward)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_mask_lives_no_longer_than_until_the_forward_after_its_backward():
    model = student(reentrant=False)
    first = loss(model, 1)
    masks = [ref(attention.mask) for attention in attentions(model).values()]
    first.backward()
    assert [attention.mask for attention in attentions(model).values()] == [m() for m in masks]
    second = loss(model, 2)
    gc.collect()
    assert all(mask() is None for mask in masks) and first is not second  # both losses live
    unused = [ref(attention.mask) for attention in attentions(model).values()]
    del second  # no backward: its graph, which would need the masks, is gone
    loss(model, 1)
    gc.collect()
    assert all(mask() is None for mask in unused)


@pytest.mark.parametrize(("training", "grad", "is_kept"), [(0, 0, 0), (0, 1, 1), (1, 0, 1)])
def test_a_step_of_sampling_keeps_no_mask(training, grad, is_kept):
    model = student().train(bool(training))
    with torch.set_grad_enabled(bool(grad)):
        loss(model, 1)
        assert all((a.mask is not None) == is_kept for a in attentions(model).values())


def test_a_second_backward_whose_masks_are_gone_is_refused():
    model = student(reentrant=False)
    first = loss(model, 1)
    first.backward(retain_graph=True)
    first.backward(retain_graph=True)
    loss(model, 2)
    with pytest.raises(ValueError, match=r"^retain_graph=True: allowed .*; run the forward again"):
        first.backward()
    loss(model, 2).backward()
