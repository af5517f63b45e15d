"""The runner times what is right, says why it does not time the rest, and stops when told."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.benchmarks import run
from gossamer.benchmarks.cases import Shape
from gossamer.benchmarks.command import record
from gossamer.benchmarks.contestants import Contestant
from gossamer.benchmarks.run import OUT_OF_TIME, Runner, reason
from gossamer.benchmarks.settings import PHASES, Settings
from gossamer.benchmarks.timing import (
    MAX_REPEATS,
    MIN_MS,
    MIN_REPEATS,
    CudaStopwatch,
    Timing,
    summarise,
)
from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.train.study_output import environment

TINY = Shape("2x100x16", 2, 100, 16)


class FakeStopwatch:
    """Runs what it times once and says that it took 2 ms; the clock moves on by a second."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.marks = 0
        self.results: list[object] = []

    def now(self) -> float:
        return self.clock

    def mark(self) -> None:
        self.marks += 1

    def time(self, run: Callable[[], object]) -> Timing:
        self.results.append(run())
        self.clock += 1
        return Timing(2.0, 1.9, 2.2, 5, 1 << 30, 0.1)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    return block_sparse_attention(q, k, v, blocks, backend="reference")[0]


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


DENSE = Contestant("dense-cudnn", attend_to_all, attend, is_dense=True)
REFERENCE = Contestant("reference", attend, attend)


@pytest.fixture
def stopwatch() -> FakeStopwatch:
    return FakeStopwatch()


@pytest.fixture
def make_runner(stopwatch: FakeStopwatch) -> Callable[..., Runner]:
    """A runner of the tiny shape in fp32 on the CPU; keys are those of Settings."""

    def make(*contestants: Contestant, **keys: object) -> Runner:
        keys = {"shape": (TINY,), "block": ((16, 8),), "sparsity": (0.75,), **keys}
        return Runner(
            Settings(**keys),  # type: ignore[arg-type]
            contestants or (REFERENCE, DENSE),
            stopwatch,
            device=torch.device("cpu"),
            dtype=torch.float32,
            now=stopwatch.now,
        )

    return make


@pytest.fixture(autouse=True)
def _small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHECK_TOKENS", 200)


def timed(runner: Runner) -> dict[str, list[str]]:
    """Return the phases that each contestant was timed in, case by case."""
    found: dict[str, list[str]] = {}
    for row in runner.rows():
        found.setdefault(row.contestant, []).append(" ".join(filter(row.timing, row.phases)))
    return found


def test_it_measures_every_case_and_phase_dense_first(
    make_runner: Callable[..., Runner], stopwatch: FakeStopwatch
) -> None:
    runner = make_runner(sparsity=(0.0, 0.75))
    rows = list(runner.rows())
    assert runner.num_rows == len(rows) == 4 and not runner.stopped
    assert [row.contestant for row in rows] == ["dense-cudnn"] + ["reference"] * 3
    assert list(rows[0].phases) == ["forward", "backward", "total"]
    assert all(list(row.phases) == list(PHASES) for row in rows[1:])
    assert all(not row.notes and max(row.errors.values()) < 1e-5 for row in rows)
    assert [row.case and row.case.rows for row in rows] == [None, "uniform", "uniform", "skewed"]
    assert rows[0].density == rows[1].density == 1
    assert all(row.density == pytest.approx(0.25, abs=0.05) for row in rows[2:])
    # A mask is the same work for both rows: its time is measured once.
    assert len(stopwatch.results) == stopwatch.marks == 3 + 5 + 5 + 3


def test_clusters_are_checked_on_their_own(make_runner: Callable[..., Runner]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        return REFERENCE.attend(q, k, v, blocks) * (1 if blocks.is_uniform else 2)

    rows = ("uniform", "clusters")
    wrong = Contestant("wrong on clusters", attend, REFERENCE.truth)
    found = timed(make_runner(REFERENCE, wrong, rows=rows))
    every, of_masks = " ".join(PHASES), "lists mask"
    assert found == {"reference": [every, every], "wrong on clusters": [every, of_masks]}


def test_what_is_timed_are_output_gradients_and_index_lists(
    make_runner: Callable[..., Runner], stopwatch: FakeStopwatch
) -> None:
    list(make_runner(REFERENCE, rows=("uniform",)).rows())
    out, grads, lists, blocks, total = stopwatch.results
    assert isinstance(out, Tensor) and out.shape == (1, 2, 100, 16) and not out.requires_grad
    for tensors in (grads, total):
        assert isinstance(tensors, tuple) and [x.shape for x in tensors] == [out.shape] * 3
    for made in (lists, blocks):
        assert isinstance(made, Blocks) and made.kv_indices.shape == (1, 2, 7, 13)
        assert made.kv_num_blocks.unique().tolist() == [3]


def test_tflops_count_kept_pairs_only(make_runner: Callable[..., Runner]) -> None:
    dense, sparse = make_runner(rows=("uniform",)).rows()
    full = 2 * 100 * 100 * 16
    assert dense.tflops("forward") == pytest.approx(4 * full / 2e-3 / 1e12)
    assert dense.tflops("total") == pytest.approx(14 * full / 2e-3 / 1e12)
    assert sparse.tflops("backward") == pytest.approx(10 * full * sparse.density / 2e-3 / 1e12)
    assert sparse.tflops("mask") is None


def test_a_wrong_output_is_not_timed(make_runner: Callable[..., Runner]) -> None:
    doubled = Contestant("doubled", lambda *args: 2 * attend(*args), attend)
    (row, _) = make_runner(doubled).rows()
    assert row.notes["forward"] == row.notes["total"] == "wrong: out off by 1.0e+00"
    assert timed(make_runner(doubled, REFERENCE))["reference"] == [" ".join(PHASES)] * 2


def test_a_wrong_gradient_keeps_only_the_forward(make_runner: Callable[..., Runner]) -> None:
    def detached(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        return attend(q, k, v + k - k.detach(), blocks)  # dk also gets dv

    runner = make_runner(Contestant("detached", detached, attend), rows=("uniform",))
    (row,) = runner.rows()
    assert row.timing("forward") and row.timing("mask")
    assert row.notes["backward"].startswith("wrong: dk off by")
    assert set(row.notes) == {"backward", "total"}


def test_nan_is_wrong(make_runner: Callable[..., Runner]) -> None:
    broken = Contestant("broken", lambda *args: attend(*args) * float("nan"), attend)
    assert all("off by nan" in row.notes["forward"] for row in make_runner(broken).rows())


def test_one_that_cannot_run_says_why_and_the_others_go_on(
    make_runner: Callable[..., Runner],
) -> None:
    def refuse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        raise ValueError("backend must be 'triton'\nand more")

    runner = make_runner(Contestant("refuser", refuse, attend), REFERENCE, rows=("uniform",))
    refused, reference = runner.rows()
    assert refused.notes == dict.fromkeys(
        ("forward", "backward", "total"), "backend must be 'triton'"
    )
    assert not reference.notes


def test_an_inference_kernel_is_timed_forward_only_within_its_tolerance(
    make_runner: Callable[..., Runner],
) -> None:
    def rounded(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        assert not torch.is_grad_enabled()
        return attend(q, k, v, blocks) * 1.05

    contestant = Contestant("rounded", rounded, attend, has_gradient=False, tolerance=0.1)
    (row,) = make_runner(contestant, rows=("uniform",)).rows()
    assert row.timing("forward") and row.errors["out"] == pytest.approx(0.05, rel=1e-3)
    assert row.notes == {"backward": "forward only", "total": "forward only"}
    (row,) = make_runner(replace(contestant, tolerance=0.01), rows=("uniform",)).rows()
    assert not row.timing("forward")


def test_running_out_of_memory_costs_only_its_own_phase(
    make_runner: Callable[..., Runner],
) -> None:
    def greedy(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        if torch.is_grad_enabled() and q.shape[2] == TINY.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(q, k, v, blocks)

    (row,) = make_runner(Contestant("greedy", greedy, attend), rows=("uniform",)).rows()
    assert row.timing("forward")
    assert row.notes["backward"] == "OutOfMemoryError: CUDA out of memory"


def test_a_lost_gpu_ends_the_run_with_what_was_measured(
    make_runner: Callable[..., Runner],
) -> None:
    def crash(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        raise torch.AcceleratorError("illegal memory access")

    runner = make_runner(DENSE, Contestant("crasher", crash, attend), REFERENCE)
    assert [row.contestant for row in runner.rows()] == ["dense-cudnn"]
    assert "the GPU is lost" in runner.stopped and "illegal memory access" in runner.stopped


def test_it_stops_cleanly_when_its_time_is_up(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(seconds=5.0)  # each phase takes a second
    rows = list(runner.rows())
    assert [row.contestant for row in rows] == ["dense-cudnn", "reference"]
    assert [phase for phase in PHASES if rows[1].timing(phase)] == ["forward", "backward"]
    assert rows[1].notes == dict.fromkeys(("lists", "mask", "total"), OUT_OF_TIME)
    assert runner.stopped == "stopped after 5 s"


def test_results_are_on_disk_after_every_row(
    make_runner: Callable[..., Runner], stopwatch: FakeStopwatch, tmp_path: Path
) -> None:
    runner, seen = make_runner(), []
    mark = stopwatch.mark

    def look() -> None:
        seen.append(len(json.loads((tmp_path / "results.json").read_text())["rows"]))
        mark()

    stopwatch.mark = look  # type: ignore[method-assign]
    rows = record(runner, tmp_path, environment("gossamer bench", "abc"), now=stopwatch.now)
    assert seen == [0] * 3 + [1] * 5 + [2] * 3
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["rows"]) == len(rows) == 3 and written["commit"] == "abc"
    assert written["progress"] == "3 of 3 rows in 11 s."
    assert written["rows"][2]["times_cudnn"]["forward"] == 1.0
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 1 + 3 and "Command: `gossamer bench`" in table


def test_a_reason_is_one_short_line() -> None:
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(RuntimeError("")) == "RuntimeError: "
    assert len(reason(RuntimeError("x" * 500))) == 120
    flex = reason(RuntimeError("LoweringException: NoValidChoicesError: none of 1"))
    assert flex.startswith("no stock kernel for this block size in torch")


def test_quantiles_of_times() -> None:
    timing = summarise([5.0, 1.0, 2.0, 4.0, 3.0], peak_bytes=7, host_ms=0.5)
    assert (timing.median_ms, timing.repeats, timing.peak_bytes) == (3.0, 5, 7)
    assert (timing.low_ms, timing.high_ms) == pytest.approx((1.8, 4.2))


@pytest.mark.gpu
def test_the_stopwatch_repeats_enough_and_sees_memory() -> None:
    stopwatch = CudaStopwatch()
    x = torch.ones(1 << 20, device="cuda")
    stopwatch.mark()
    timing = stopwatch.time(lambda: x + 1)
    is_enough = timing.median_ms * timing.repeats > 0.5 * MIN_MS
    assert timing.repeats >= MIN_REPEATS and (is_enough or timing.repeats >= MAX_REPEATS)
    assert timing.low_ms <= timing.median_ms <= timing.high_ms
    assert timing.peak_bytes == x.nbytes
