"""Which step a call is: by diffusers' own index, and by the timestep where there is none."""

import pytest
import torch
from tiny import tiny_wan

from gossamer.sparse.attach import attach, attentions
from gossamer.sparse.install import RECORD
from gossamer.sparse.methods import method_named
from gossamer.sparse.trajectory import Trajectory


def test_an_index_that_does_not_rise_begins_a_run():
    found = Trajectory()
    calls = [(b, i) for i in (0, 1, 2, 0, 1) for b in ("cond", "uncond")]
    assert [found.by_index(*call, 500.0) for call in calls] == [(i, i == 0) for _, i in calls]
    second = Trajectory()  # the second transformer of Wan 2.2 sees late steps only
    assert [second.by_index("cond", i, 500.0) for i in (20, 21, 20, 21)] == [
        (20, True), (21, False), (20, True), (21, False),
    ]  # fmt: skip


def test_a_rising_noise_level_begins_a_run_whatever_the_index():
    second = Trajectory()  # of a run of 20 steps, then of 50
    calls = [(18, 0.3), (19, 0.1), (31, 0.5), (32, 0.45), (33, 0.45)]
    assert [second.by_index("cond", *call) for call in calls] == [
        (18, True), (19, False), (31, True), (32, False), (33, False),
    ]  # fmt: skip


def test_a_level_that_rises_or_stays_where_the_run_began_begins_a_run_of_its_branch():
    found = Trajectory()
    for run in ((1000.0, 600.0, 200.0), (1000.0, 600.0), (800.0, 200.0), (400.0, 150.0)):
        for step, level in enumerate(run):
            for branch in ("cond", "uncond"):
                assert found.by_level(branch, level) == (step, step == 0)
    one_step = Trajectory()
    assert [one_step.by_level("cond", 1000.0) for _ in range(3)] == [(0, True)] * 3


def test_heuns_second_evaluations_are_steps_of_the_same_run():
    found, levels = Trajectory(), (1000.0, 900.0, 900.0, 800.0, 800.0)
    for _ in range(2):
        assert [found.by_level("cond", x)[0] for x in levels] == [0, 1, 2, 3, 4]


def test_calls_without_a_branch_share_a_step_at_one_level():
    found = Trajectory()
    seen = [found.by_level(None, x) for x in (9.0, 9.0, 5.0, 5.0, 1.0, 1.0, 9.0, 9.0)]
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 0, 0]


def call(model, timestep, name, **place):
    """Run an attached model on a clip of two frames, as a pipeline does."""
    with torch.no_grad(), model.cache_context(name, **place):
        model(
            hidden_states=torch.zeros(1, 4, 2, 4, 4),
            timestep=timestep,
            encoder_hidden_states=torch.zeros(1, 3, 16),
        )


@pytest.mark.parametrize("says_sigma", [False, True])
def test_a_second_transformer_forgets_its_clusters_in_a_longer_run(says_sigma):
    pytest.importorskip("diffusers")
    model = attach(tiny_wan(), method_named("svg2", 0.5, num_q=2, num_kv=4))
    layer = attentions(model)["blocks.0.attn1"]
    warm = []
    for index, level in ((18, 0.3), (19, 0.1), (31, 0.5), (32, 0.45)):
        sigma = {"sigma": level} if says_sigma else {}
        # a sigma saves reading the timestep, which waits for the GPU
        timestep = torch.tensor([500.0 if says_sigma else 1000 * level])
        call(model, timestep, "cond", step_index=index, **sigma)
        warm.append(layer.codebooks._warm)
    assert warm == [0, 1, 1, 2]


def test_timesteps_of_each_token_count_by_their_largest():
    pytest.importorskip("diffusers")
    model = attach(tiny_wan(), method_named("svg1", 0.5), dense_steps=1)
    steps = []
    for level in (900.0, 500.0, 900.0):  # Wan 2.2 TI2V: tokens of the given frame have 0
        call(model, torch.tensor([[0.0] * 4 + [level] * 4]), "cond")
        steps.append(model.__dict__[RECORD].trajectory._step["cond"])
    assert steps == [0, 1, 0]
