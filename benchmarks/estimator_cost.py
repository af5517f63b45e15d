"""What each way to a block mask costs beside the sparse attention it serves, on a GPU.

    python -m gossamer.benchmarks.estimator_cost [--shape A] [--sparsity 0.95] [--plot docs/...png]

From q, k, v in sequence order to the index lists: layout (clusters go on from the step before),
permutation, estimator, policy and lists; then attention forward in the layout's blocks. Times are
of the GPU with the host ahead; random q, k and v. Writes table, figures and plot to --out.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gossamer.benchmarks.cases import SHAPES
from gossamer.benchmarks.timing import CudaStopwatch
from gossamer.kernels.dense_attention.op import dense_attention
from gossamer.sparse.attention import MaskEstimator
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.head_pattern import HeadPattern
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import BlockLayout, Layout, RowMajor, TokenGrid, permute_qkv
from gossamer.sparse.layouts.clusters import Clusters, Codebook, SemanticClusters, SortedClusters
from gossamer.sparse.layouts.head_pattern import HeadPattern as HeadPatternLayout
from gossamer.sparse.mask import BlockMask
from gossamer.sparse.policies import Hybrid
from gossamer.train.refusal import in_one_line
from gossamer.train.study_output import draw_bars, environment, heading

PARTS = ("layout", "permute", "mask", "attention")
GRIDS = {"A": TokenGrid(21, 30, 52), "B": TokenGrid(21, 45, 80)}
METHODS: dict[str, tuple[Layout, MaskEstimator, type[Hybrid], Drop | Centroid]] = {
    "mean-pool, 128 x 64": (RowMajor(), MeanPool(), Hybrid, Drop()),
    "mean-pool with guard, 128 x 64": (RowMajor(), MeanPool(similarity=0.0), Hybrid, Drop()),
    "mean-pool + centroids, 128 x 64": (RowMajor(), MeanPool(), Hybrid, Centroid()),
    "SVG1, 128 x 64": (HeadPatternLayout(), HeadPattern(), Hybrid, Drop()),
    "SVG2, clusters": (SemanticClusters(), MeanPool(), Hybrid, Drop()),
    "SVG-EAR, clusters": (SemanticClusters(), ErrorAware(), ErrorBudget, Centroid()),
    "SVG-EAR, sorted tiles 128 x 64": (SortedClusters(), ErrorAware(), ErrorBudget, Centroid()),
    "SVG-EAR, tiles 128 x 64": (RowMajor(), ErrorAware(), ErrorBudget, Centroid()),
}


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(GRIDS), default="A")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_cost"))
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("device=cpu: allowed is a machine with a GPU; run it on one")
    shape, grid = SHAPES[options.shape], GRIDS[options.shape]
    torch.manual_seed(0)
    q, k, v = torch.randn(
        3, 1, shape.heads, grid.num_tokens, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    stopwatch, rows = CudaStopwatch(), []
    dense = _milliseconds(stopwatch, lambda: dense_attention(q, k, v))
    for name, (layout, estimator, policy, compensation) in METHODS.items():
        budget = policy(k=1 - options.sparsity, num_heads=shape.heads).cuda()
        try:
            rows.append(
                _measure(stopwatch, name, layout, estimator, budget, compensation, q, k, v, grid)
            )
        except (ValueError, torch.OutOfMemoryError) as error:
            rows.append({"method": name, "error": str(error).splitlines()[0]})
        sys.stderr.write(f"{rows[-1]}\n")
    command = shlex.join(["python", "-m", "gossamer.benchmarks.estimator_cost", *arguments])
    header = environment(command, options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {**header, "dense_ms": dense, "rows": rows}
    (options.out / "estimator_cost.json").write_text(json.dumps(results, indent=1) + "\n")
    text = _markdown(options, header, dense, rows)
    (options.out / "estimator_cost.md").write_text(text)
    _draw(options.plot or options.out / "estimator_cost.png", dense, rows)
    sys.stdout.write(text)
    return 0


@torch.no_grad()
def _measure(
    stopwatch: CudaStopwatch,
    name: str,
    layout: Layout,
    estimator: MaskEstimator,
    policy: Hybrid,
    compensation: Drop | Centroid,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
) -> dict[str, float | str]:
    lay = partial(layout, q, k, v, grid)
    if isinstance(layout, Clusters):
        lay = partial(_warm, layout, layout.cluster(q, k, grid, None).codebook, q, k, grid)
    q_layout, kv_layout = lay()
    permuted = partial(permute_qkv, q_layout, kv_layout, q, k, v)
    inner = permuted()

    def choose() -> BlockMask:
        mask = policy(estimator(*inner, q_layout, kv_layout))
        mask.blocks  # noqa: B018 - the lists are a part of the cost
        return mask

    mask = choose()
    blocks = mask.blocks
    times = {
        "layout": _milliseconds(stopwatch, lay),
        "permute": _milliseconds(stopwatch, permuted),
        "mask": _milliseconds(stopwatch, choose),
        "attention": _milliseconds(stopwatch, lambda: compensation(*inner, blocks, "auto", None)),
    }
    return {"method": name, "density": float(mask.density.mean()), **times}


def _warm(
    layout: Clusters, codebook: Codebook, q: Tensor, k: Tensor, grid: TokenGrid
) -> tuple[BlockLayout, BlockLayout]:
    found = layout.cluster(q, k, grid, codebook)
    return found.q_layout, found.kv_layout


def _milliseconds(stopwatch: CudaStopwatch, run: Callable[[], object]) -> float:
    with torch.no_grad():
        stopwatch.mark()
        return stopwatch.time(run).median_ms


def _markdown(
    options: argparse.Namespace, header: dict[str, str], dense: float, rows: list[dict]
) -> str:
    lines = [
        f"# Cost of the estimators, shape {options.shape}",
        "",
        f"{heading(header)} Dense attention forward: {dense:.3f} ms. "
        "Milliseconds of the GPU; share: layout, permutation and mask over the attention.",
        "",
        "| method | density | layout | permute | mask | attention | share | x dense, all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['error']} |")
            continue
        extra = row["layout"] + row["permute"] + row["mask"]
        lines.append(
            f"| {row['method']} | {row['density']:.4f} | {row['layout']:.3f} | {row['permute']:.3f}"
            f" | {row['mask']:.3f} | {row['attention']:.3f} | {extra / row['attention']:.0%}"
            f" | {dense / (extra + row['attention']):.1f} |"
        )
    return "\n".join(lines) + "\n"


def _draw(path: Path, dense: float, rows: list[dict]) -> None:
    shown = {
        row["method"]: {part: row[part] for part in PARTS} for row in rows if "error" not in row
    }
    draw_bars(path, shown, x=f"ms of the GPU (dense attention: {dense:.2f})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
