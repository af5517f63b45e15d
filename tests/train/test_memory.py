"""The memory estimate against what the allocator gave two real steps, by torch's CPU profiler."""

import gc
import logging
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gossamer.benchmarks.calibration import calibrator
from gossamer.benchmarks.training_step import Step
from gossamer.sparse.bound import MapError
from gossamer.train.check import _planned, check
from gossamer.train.config import build, compose
from gossamer.train.live_bytes import LikeCuda, LiveBytes
from gossamer.train.memory import Memory, Split, advice, estimate, estimate_calibration
from gossamer.train.memory_limit import within_memory
from gossamer.train.refusal import OutOfMemory, Refusal

BLOCKS = ["layout.q_block=64", "layout.kv_block=64"]
SHORT = ["backend=reference", "calibration.clips=1", "calibration.noise_levels=[0.7,0.3]"]
LATENT, TEXT = (4, 4, 16, 16), (16, 32)  # 256 tokens


def config(*more: str) -> Any:
    """Return a run of a small Wan whose heads and blocks Triton takes."""
    return compose(
        [
            "device=cpu",
            "model=scratch_wan",
            "model.num_layers=3",
            "model.num_heads=2",
            "model.head_dim=32",
            "model.ffn_dim=256",
            "model.channels=4",
            "model.text_dim=32",
            "layout=row_major",
            *([] if "layout=semantic_clusters" in more else BLOCKS),
            "batch_size=1",
            "sparsity=0.5",
            "policy.k=0.5",
            "backend=triton",
            *more,
        ]
    )


@cache
def plan_of(*settings: str, dtype: torch.dtype = torch.bfloat16) -> Memory:
    return estimate(config(*settings), LATENT, TEXT, dtype=dtype, clips=1)


@cache
def plan_of_calibration(*settings: str) -> Memory:
    return estimate_calibration(config(*settings), LATENT, TEXT, dtype=torch.bfloat16)


def real_step(cfg: Any, dtype: torch.dtype = torch.float32) -> Step:
    return Step(cfg, LATENT, TEXT, torch.device("cpu"), dtype=dtype)


def measured(cfg: Any, dtype: torch.dtype) -> int:
    """Return the most bytes that the allocator had given at once during two steps."""

    def steps() -> None:
        step = real_step(cfg, dtype)
        step()
        step()

    return allocated(steps)


def allocated(work: Callable[[], object]) -> int:
    """Return the most bytes that the allocator had given at once during the work."""
    gc.collect()  # what goes later must not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (["sparsity=0.0"], torch.float32),
        (["sparsity=0.0", "gradient_checkpointing=true"], torch.float32),
        (["sparsity=0.0", "gradient_checkpointing=true"], torch.bfloat16),
        (["sparsity=0.0", "loss=flow_matching"], torch.bfloat16),
        (["gradient_checkpointing=true", "model.num_layers=2"], torch.float32),
        (["sparsity=0.0", "lora.rank=4", "teacher=shared"], torch.bfloat16),
        (["sparsity=0.0", "grad_accumulation=2", "batch_size=2"], torch.float32),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)[6:],
)  # fmt: skip
def test_the_estimate_is_within_2_percent_of_what_two_steps_allocate(
    settings: list[str], dtype: torch.dtype, one_thread: None
) -> None:
    cfg = config(*settings)
    found = estimate(cfg, LATENT, TEXT, dtype=dtype, clips=1)
    planned = found.total - found.parts["workspaces"]  # cuBLAS's
    truth = measured(cfg, dtype)
    assert abs(planned / truth - 1) < 0.02, (planned, truth, str(found.parts))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (["allocation=velocity"], torch.float32),
        (["allocation=velocity", "layout=per_head", "layout.tile=[2,2,2]"], torch.float32),
        (["allocation=velocity", "model.num_layers=8"], torch.bfloat16),
        (["allocation=water_fill"], torch.float32),
        (["allocation=uniform"], torch.float32),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value)[6:],
)
def test_the_estimate_is_within_10_percent_of_what_a_calibration_allocates(
    settings: list[str], dtype: torch.dtype, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(*SHORT, *settings)
    # fp64 for some rows: much beside 256 tokens, little beside 32,760
    nothing = MapError(*torch.zeros(3, 1, 2))
    monkeypatch.setattr("gossamer.train.gauge.map_error", lambda *_, **__: nothing)

    def work() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            gauge = calibrator(cfg, LATENT, TEXT, torch.device("cpu")).gauge
            layers = len(gauge.layers)
            if "layout=per_head" in settings:
                gauge.choice = [[4, 4]] * layers  # in clusters
            measure, half = build(cfg.allocation).measure, torch.full((layers, 2), 0.5)
            gauge.curves(measure)
            gauge.outcome(half, half, measure)

    planned = estimate_calibration(cfg, LATENT, TEXT, dtype=dtype)
    truth = allocated(work)
    plan = planned.total - planned.parts["workspaces"]
    assert abs(plan / truth - 1) < 0.1, (plan, truth, str(planned.parts))


def test_the_bytes_at_the_start_of_a_step_do_not_grow(one_thread: None) -> None:
    live = LiveBytes("cpu")
    with live:
        step = real_step(config("gradient_checkpointing=true", "ema=0.9", "backend=reference"))
        entries = []
        for _ in range(4):
            gc.collect()
            entries.append(live.now.total())
            step()
    assert entries[1] > entries[0]  # the first step makes the optimizer's state, and masks stay
    assert entries[1] == entries[2] == entries[3]


def test_a_sparse_step_takes_at_most_5_percent_more_than_a_dense_one() -> None:
    wan = ["model.num_heads=12", "model.head_dim=128", "model.ffn_dim=8960", "model.text_dim=4096"]
    blocks = ["layout.q_block=128", "sparsity=0.95", "policy.k=0.05", "teacher=cached"]
    for recompute in ("true", "false"):
        more = [*wan, f"gradient_checkpointing={recompute}", "noise_draws=1"]
        sparse, dense = (
            estimate(
                config(*blocks, *more, *last),
                (4, 21, 60, 104),
                (512, 4096),
                dtype=torch.bfloat16,
                clips=1,
            )
            for last in ([], ["sparsity=0.0"])
        )
        assert dense.total < sparse.total < 1.05 * dense.total
        assert sparse.parts["activations"] < 1.05 * dense.parts["activations"]


def test_processes_share_the_states_and_gather_two_blocks() -> None:
    whole = plan_of()

    def plan(**split: Any) -> dict[str, int]:
        return whole.divided(Split(**split)).parts

    one, eight = plan(), plan(replicas=8, shards=8)
    for name in ("weights", "optimizer"):
        assert eight[name] == one[name] // 8
    assert eight["teacher"] == one["teacher"]
    assert plan(shards=8, teacher_sharded=True)["teacher"] == one["teacher"] // 8
    block = eight["gathered blocks"] // (2 * (2 + 4))  # parameters, in bf16 and gradients in fp32
    assert 30_000 < block < one["weights"] // 4 // 3
    assert plan(shards=8, sequence=2)["activations"] < eight["activations"]
    replicas = plan(replicas=8)
    assert replicas["DDP's buckets"] > 0 and replicas["weights"] == one["weights"]
    assert plan(replicas=2, sequence=2)["DDP's buckets"] == replicas["DDP's buckets"]
    assert "DDP's buckets" not in one.keys() | eight.keys()


def test_a_split_step_peaks_where_shares_of_gradients_and_activations_do() -> None:
    states = {"weights": 80, "gradients": 80}
    one = Memory("backward", {}, states, {0: 100, 80: 40}, gathered=6)  # gradients: activations
    shards, sequence = one.divided(Split(shards=2)).parts, one.divided(Split(sequence=2)).parts
    assert (shards["weights"], shards["gradients"], shards["activations"]) == (40, 0, 100)
    assert (sequence["weights"], sequence["gradients"], sequence["activations"]) == (80, 80, 20)


@pytest.mark.parametrize(
    ("settings", "part", "less"),
    [
        (["teacher=offloaded"], "teacher", True),
        (["optimizer=adamw_8bit"], "optimizer", True),
        (["lora.rank=4"], "optimizer", True),
        (["gradient_checkpointing=true"], "activations", True),
        (["ema=0.9"], "average", False),
    ],
)
def test_each_setting_moves_its_own_part(settings: list[str], part: str, less: bool) -> None:
    before, after = (plan_of(*more, dtype=torch.float32).parts for more in ([], settings))
    assert (after.get(part, 0) < before.get(part, 0)) is less, (before, after)
    assert before["weights"] <= after["weights"] < 1.1 * before["weights"]  # LoRA adds a little


def test_a_cached_teacher_takes_nothing_and_an_unknown_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached = config("teacher=cached", "noise_draws=2")
    assert "teacher" not in estimate(cached, LATENT, TEXT, dtype=torch.float32, clips=1).parts
    monkeypatch.setattr("gossamer.train.memory.Frozen", type("Other", (), {}))
    with pytest.raises(Refusal, match="teacher=Frozen"):
        estimate(config(), LATENT, TEXT, dtype=torch.float32, clips=1)


@pytest.mark.parametrize(
    "settings",
    [
        ["policy=trained_hybrid", "policy.k=0.5"],
        ["estimator=router"],
        ["compensation=linear"],
        ["layout=sorted_clusters"],
        ["layout=semantic_clusters", "estimator=error_aware", "policy=error_budget"],
        ["layout=head_pattern", "estimator=head_pattern"],
    ],
)
def test_every_kind_of_mask_can_be_planned(settings: list[str]) -> None:
    plain, other = plan_of(), plan_of(*settings)
    assert plain.total * 0.9 < other.total < plain.total * 1.5


@pytest.mark.parametrize(
    "settings",
    [
        ["allocation=error_bound", "compensation=filtered_drop"],
        ["layout=semantic_clusters", "estimator=error_aware", "policy=error_budget"],
        ["layout=head_pattern", "estimator=head_pattern", "allocation=fixed"],
        ["estimator=oracle", "allocation.measure=velocity_exact"],
        ["estimator=router", "policy=trained_hybrid", "compensation=linear"],
    ],
)
def test_the_calibration_of_every_kind_of_mask_can_be_planned(settings: list[str]) -> None:
    plain, other = plan_of_calibration(), plan_of_calibration(*settings)
    assert plain.total * 0.9 < other.total < plain.total * 1.1


def test_the_advice_names_three_settings_that_are_not_used_yet() -> None:
    assert advice(config()) == (
        "gradient_checkpointing=true, teacher=cached noise_draws=16, optimizer=adamw_8bit"
    )
    lean = config("gradient_checkpointing=true", "teacher=cached", "noise_draws=1", "batch_size=4")
    assert advice(lean) == "grad_accumulation=4, optimizer=adamw_8bit, lora.rank=64"


def test_live_bytes_counts_storages_once_and_until_they_go() -> None:
    live = LiveBytes("cpu")
    with live:
        x = torch.empty(1024)
        y = x.view(32, 32).t()
        assert live.now.total() == 4096
        live.count(x, "weights")
        assert live.now == {"weights": 4096, "activations": 0}
        z = y + 1
        small = torch.empty(1)
        assert live.now["activations"] == 4096 + 512
        del z, small
    assert live.now["activations"] == 0 and live.now["weights"] == 4096
    assert live.peak.total() == 2 * 4096 + 512
    del x, y
    assert live.now.total() == 0


def test_meta_tensors_are_cast_as_cuda_would_cast_them() -> None:
    like = LikeCuda()
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    frozen = torch.empty(8, 8, device="meta")
    x = torch.empty(4, 8, device="meta")
    seen: list[Tensor] = []
    with like:
        assert (x @ weight).dtype == torch.float32
        with like.autocast(torch.bfloat16):
            assert (x @ weight).dtype == torch.bfloat16
            assert torch.nn.functional.linear(x, frozen).dtype == torch.bfloat16
            assert (x + weight[:4]).dtype == torch.float32
            live = LiveBytes("meta")
            with live:
                seen.append(x @ weight)  # made: the product and x's cast, which backward needs
                assert live.now.total() == 2 * 512
                seen.append(x @ frozen)  # and only the product stays
                assert live.now.total() == 3 * 512
            with torch.autocast("cpu", enabled=False):
                assert (x @ weight).dtype == torch.float32
        q = torch.empty(1, 2, 4096, 16, device="meta", requires_grad=True)
        live = LiveBytes("meta")
        with live:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert live.peak.total() < 2 * q.numel() * 4  # no logits


def test_check_tells_the_memory_of_a_step(tmp_path: Any) -> None:
    where = [f"data.dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "device=cpu"]
    facts = check(compose(["recipe=demo", *where]))
    for name in ("memory", "calibration"):
        assert " GiB at the peak, in " in facts[name] and "activations" in facts[name]
    compiled = check(compose(["recipe=demo", *where, "compile=true"]))
    assert compiled["memory"] == f"at most {facts['memory']} (compiled blocks keep less)"
    assert compiled["calibration"] == facts["calibration"]


@pytest.mark.parametrize("asked", ["sparsity=0.0", "calibration.path=old"])
def test_a_run_that_does_not_calibrate_plans_no_calibration(asked: str, tmp_path: Any) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "calibration.json").write_text("{}")
    where = [f"data.dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "device=cpu"]
    facts = check(compose(["recipe=demo", *where, asked.replace("old", f"{tmp_path}/old")]))
    assert "memory" in facts and "calibration" not in facts


def test_a_gpu_that_cannot_calibrate_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config("allocation=velocity")
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=2**20)
    )
    monkeypatch.setattr(logging.getLogger("gossamer"), "propagate", True)
    plan = partial(estimate_calibration, cfg, LATENT, TEXT, dtype=torch.float32)
    _planned("calibrate", cfg, plan, torch.device("cuda"))
    (said,) = caplog.messages
    assert said.startswith("the calibration needs about 0.1 GiB and the GPU has 0.0; try ")
    assert "evaluation.batch_size=1, allocation=uniform" in said


def test_running_out_of_memory_names_settings_for_the_stage(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.train.check.check_data", lambda cfg, *_: cfg.data)
    where = [f"data.dir={tmp_path}/data", f"runs_dir={tmp_path}/runs", "device=cpu"]
    job: Any = SimpleNamespace(cfg=compose(["recipe=demo", *where]), device=torch.device("cpu"))
    said = {}
    for stage in ("train", "calibrate"):
        with pytest.raises(OutOfMemory) as end, within_memory(job, stage):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
        said[stage] = str(end.value)
        assert end.value.code == 4 and "Tried to allocate 2 GiB." in said[stage]
    assert "room for a training step: " in said["train"]
    assert "room for the calibration: " in said["calibrate"]
    assert said["train"].endswith(
        "set gradient_checkpointing=true, grad_accumulation=4, teacher=cached noise_draws=16"
    )
    assert "set evaluation.batch_size=1, allocation=uniform, a smaller data" in said["calibrate"]
