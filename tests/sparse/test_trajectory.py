"""Which step a call is: by diffusers' own index, and by the timestep where there is none."""

import torch

from gossamer.sparse.trajectory import Trajectory


def t(*values):
    return torch.tensor(values)


def test_an_index_that_does_not_rise_begins_a_run():
    found = Trajectory()
    calls = [(b, i) for i in (0, 1, 2, 0, 1) for b in ("cond", "uncond")]
    assert [found.by_index(*call) for call in calls] == [(i, i == 0) for _, i in calls]
    second = Trajectory()  # the second transformer of Wan 2.2 sees late steps only
    assert [second.by_index("cond", i) for i in (20, 21, 20, 21)] == [
        (20, True), (21, False), (20, True), (21, False),
    ]  # fmt: skip


def test_a_timestep_that_does_not_fall_begins_a_run_of_its_branch():
    found = Trajectory()
    for run in ((1000.0, 600.0, 200.0), (1000.0, 600.0), (600.0, 200.0), (200.0, 150.0)):
        for step, value in enumerate(run):
            for branch in ("cond", "uncond"):
                assert found.by_timestep(branch, t(value, value)) == (step, step == 0)
    one_step = Trajectory()
    assert [one_step.by_timestep("cond", t(1000.0)) for _ in range(3)] == [(0, True)] * 3


def test_calls_without_a_branch_share_a_step_at_one_timestep():
    found = Trajectory()
    seen = [found.by_timestep(None, t(x)) for x in (9.0, 9.0, 5.0, 5.0, 1.0, 1.0, 9.0, 9.0)]
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2, 0, 0]


def test_timesteps_of_each_token_count_by_their_largest():
    found = Trajectory()  # Wan 2.2 TI2V: tokens of the given frame have 0
    assert found.by_timestep("cond", t(0.0, 900.0)[None]) == (0, True)
    assert found.by_timestep("cond", t(0.0, 500.0)[None]) == (1, False)
    assert found.by_timestep("cond", t(0.0, 900.0)[None]) == (0, True)
