"""Clusters in a diffusers model: carried by the pipeline's own naming of its calls, and let go."""

import copy

import pytest
import torch
from tiny import tiny_wan

from gossamer.sparse.attach import attach, attentions, detach
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.layouts.clusters import SemanticClusters

pytest.importorskip("diffusers")


def method():
    layout = SemanticClusters(num_q=4, num_kv=8)
    return SparseMethod(layout, ErrorAware(), ErrorBudget(k=0.3), Centroid())


def run(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return model(
        hidden_states=torch.randn(1, 4, 3, 8, 8, generator=generator),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16, generator=generator),
        return_dict=False,
    )[0]


@torch.no_grad()
def test_named_calls_carry_a_codebook_for_each_branch_and_layer():
    model = attach(tiny_wan(), method())
    for step in range(2):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch, step_index=step):
                run(model, step)
    for attention in attentions(model).values():
        assert set(attention.codebooks.carried) == {"cond", "uncond"}
        assert attention.codebooks.hit_rate.shape == (2, 1, 2)
    with model.cache_context("cond", step_index=0):  # another prompt
        first = run(model, 5)
    assert torch.equal(first, run(attach(tiny_wan(), method()), 5))


@torch.no_grad()
def test_calls_without_a_name_start_cold():
    model = attach(tiny_wan(), method())
    alone = run(model, 1)
    run(model, 0)
    assert torch.equal(run(model, 1), alone)
    assert all(not a.codebooks.carried for a in attentions(model).values())


@torch.no_grad()
def test_a_copy_carries_its_own_and_detach_leaves_nothing():
    stock = run(tiny_wan())
    model = attach(tiny_wan(), method())
    twin = copy.deepcopy(model)
    with twin.cache_context("cond", step_index=0):
        run(twin)
    assert all(a.codebooks.carried for a in attentions(twin).values())
    assert all(not a.codebooks.carried for a in attentions(model).values())
    detach(model)
    assert "cache_context" not in model.__dict__
    assert torch.equal(run(model), stock)


def test_gradient_checkpointing_trains_on_the_same_clusters_twice():
    gradients = []
    for checkpointing in (False, True):
        model = attach(tiny_wan().train(), method())
        if checkpointing:
            model.enable_gradient_checkpointing()
        run(model).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
