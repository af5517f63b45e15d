"""Attention error against density of every estimator, and which probe foresees the error.

    python -m gossamer.benchmarks.estimators --device cuda --every 2 --plot docs/estimators.png
    python -m gossamer.benchmarks.estimators --data synthetic --problems 1 --every 4  # on a CPU
    python -m gossamer.benchmarks.estimators recipe=study model.path=TEACHER data.source=FILM

q, k and v are synthetic, and captured from the dense model of a recipe, or of recipe=demo. Writes
estimators.md and estimators.json to --out and a plot to --plot. Every method gets its density by
bisection of one p for all heads (a quarter of the density as Top-k floor), or by k. SVG1 chooses
each head's order by the band of that density, as method_named does.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.benchmarks.attention_error import (
    Errors,
    TrueErrors,
    errors_of,
    rank_correlation,
)
from gossamer.benchmarks.estimators_report import markdown, plot
from gossamer.benchmarks.tensors import Problem, captured, synthetic
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.head_pattern import HeadPattern as Band
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.estimators.oracle import Oracle
from gossamer.sparse.layout import BlockLayout, Layout, Tiles, permute_qkv
from gossamer.sparse.layouts.clusters import SemanticClusters, SortedClusters
from gossamer.sparse.layouts.head_pattern import HeadPattern
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid
from gossamer.train.files import write_atomic
from gossamer.train.refusal import in_one_line
from gossamer.train.study_output import environment

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
Q_TOKENS, KV_TOKENS = 32, 16  # mean tokens of a cluster, and of the tiles
Choose = Callable[[BlockScores, float], BlockMask]
Placed = tuple[Tensor, Tensor, Tensor, BlockLayout, BlockLayout]  # q, k, v in block order


@dataclass(frozen=True)
class Method:
    name: str
    layout: str
    estimator: Any
    choose: Choose
    compensated: bool


class Random:
    """Scores drawn at random: what any choice must beat."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_layout: Any, kv_layout: Any
    ) -> BlockScores:
        shape = (*q.shape[:2], q_layout.num_blocks, kv_layout.num_blocks)
        score = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(q.device)
        return BlockScores(q_layout, kv_layout, score / score.sum(-1, keepdim=True))


def by_p(policy: type[Hybrid], **settings: Any) -> Choose:
    """Bisect p so that the mean density of all heads is the one asked for."""

    def choose(scores: BlockScores, density: float) -> BlockMask:
        def mask(k: float, p: float) -> BlockMask:
            return policy(k=k, p=p, **settings).to(scores.score.device)(scores)

        low, high = 0.0, 1.0
        floor = density / 4
        for _ in range(14):
            p = (low + high) / 2
            if float(mask(floor, p).density.mean()) > density:
                high = p
            else:
                low = p
        return mask(floor, low)

    return choose


def by_k(policy: type[Hybrid], **settings: Any) -> Choose:
    def choose(scores: BlockScores, density: float) -> BlockMask:
        return policy(k=density, **settings).to(scores.score.device)(scores)

    return choose


def mass_of(scores: BlockScores, density: float) -> BlockMask:
    """The Hybrid set of the probe's own attention mass."""
    assert scores.mass is not None
    return by_p(Hybrid)(BlockScores(scores.q_layout, scores.kv_layout, scores.mass), density)


METHODS = (
    Method("random, dropped", "tiles", Random(), by_k(Hybrid), False),
    Method("SVG1 dropped", "bands", Band(), by_k(Hybrid), False),
    Method("mean-pool tiles, dropped", "tiles", MeanPool(), by_p(Hybrid), False),
    Method("mean-pool tiles, compensated", "tiles", MeanPool(), by_p(Hybrid), True),
    Method("SVG2 dropped", "clusters", MeanPool(), by_p(Hybrid), False),
    Method("SVG2 compensated", "clusters", MeanPool(), by_p(Hybrid), True),
    Method("probe mass, compensated", "clusters", ErrorAware(), mass_of, True),
    Method("EAR released score", "clusters", ErrorAware(kind="keys"), by_p(ErrorBudget), True),
    Method("EAR E^out", "clusters", ErrorAware(), by_p(ErrorBudget), True),
    Method("EAR E^out, budget by head", "clusters", ErrorAware(),
           by_p(ErrorBudget, scope="head", guaranteed=0.0), True),
    Method("EAR E^out, budget by layer", "clusters", ErrorAware(),
           by_p(ErrorBudget, scope="layer", guaranteed=0.0), True),
    Method("EAR E^out, sorted tiles", "sorted", ErrorAware(), by_k(Hybrid), True),
    Method("EAR E^out, 3-D tiles", "tiles", ErrorAware(), by_k(Hybrid), True),
    Method("oracle mass, dropped", "clusters", Oracle(), by_p(Hybrid), False),
    Method("oracle error, compensated", "clusters", TrueErrors(), by_p(ErrorBudget), True),
    Method("oracle error, by layer", "clusters", TrueErrors(),
           by_p(ErrorBudget, scope="layer", guaranteed=0.0), True),
)  # fmt: skip


def layouts_for(tokens: int, cold_iterations: int = 10) -> dict[str, Layout]:
    counts = {"num_q": tokens // Q_TOKENS, "num_kv": tokens // KV_TOKENS}
    counts["cold_iterations"] = cold_iterations
    return {
        "tiles": Tiles(block=(2, 2, 4)),
        "clusters": SemanticClusters(**counts),
        "sorted": SortedClusters(q_block=Q_TOKENS, kv_block=KV_TOKENS, **counts),
    }


def curves(problems: list[Problem], densities: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """Return for each method, at each density, the errors meaned over problems and heads."""
    found: dict[str, list[list[Errors]]] = {m.name: [[] for _ in densities] for m in METHODS}
    for problem in problems:
        layouts = layouts_for(problem.grid.num_tokens)
        placed = {name: _place(problem, layout) for name, layout in layouts.items()}
        for method in METHODS:
            scored = _scored(problem, method, placed, densities)
            for d, (density, (inner, scores)) in enumerate(zip(densities, scored, strict=True)):
                mask = method.choose(scores, density)
                errors = errors_of(*inner[:3], mask, compensated=method.compensated)
                found[method.name][d].append(errors)
    return {name: [_mean(errors) for errors in rows] for name, rows in found.items()}


def _place(problem: Problem, layout: Layout) -> Placed:
    parts = layout(problem.q, problem.k, problem.v, problem.grid)
    return (*permute_qkv(*parts, problem.q, problem.k, problem.v), *parts)


def _scored(
    problem: Problem, method: Method, placed: dict[str, Placed], densities: Sequence[float]
) -> Iterator[tuple[Placed, BlockScores]]:
    """Yield what `_place` returns and its scores for each density: the same, but for SVG1."""
    if method.layout == "bands":
        for density in densities:
            layout = HeadPattern(q_block=Q_TOKENS, kv_block=KV_TOKENS, density=density)
            inner = _place(problem, layout)
            yield inner, method.estimator(*inner)
    else:
        inner = placed[method.layout]
        yield from repeat((inner, method.estimator(*inner)), len(densities))


def _mean(errors: list[Errors]) -> dict[str, Any]:
    def mean(field: str) -> float:
        return float(torch.cat([getattr(e, field) for e in errors]).double().mean())

    return {
        "density": mean("density"),
        "output_error": mean("output") ** 0.5,
        "map_error": mean("map"),
        "by_problem": [float(e.output.double().mean()) ** 0.5 for e in errors],
    }


def correlations(problems: list[Problem]) -> dict[str, dict[str, float]]:
    """Return how well each score ranks blocks by the true error, within rows and across a head."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for problem in problems:
        layouts = layouts_for(problem.grid.num_tokens)
        for name in ("tiles", "clusters"):
            inner = _place(problem, layouts[name])
            true = TrueErrors()(*inner)
            assert true.error is not None
            truth = true.score * true.error[..., None]
            ranked = {
                "E^out (output)": ErrorAware()(*inner),
                "released (keys)": ErrorAware(kind="keys")(*inner),
                "centroid mass": MeanPool()(*inner),
            }
            for label, scores in ranked.items():
                row = scores.error[..., None] if scores.error is not None else 1
                cells = found.setdefault(f"{label}, {name}", {"row": [], "head": []})
                cells["row"].append(rank_correlation(scores.score, truth).mean(-1)[0].cpu())
                flat = (scores.score * row).flatten(2)
                cells["head"].append(rank_correlation(flat, truth.flatten(2))[0].cpu())
    return {
        label: {scope: float(torch.cat(x).mean()) for scope, x in cells.items()}
        for label, cells in found.items()
    }


def rounds(problems: list[Problem]) -> dict[str, float]:
    """Return the error of EAR at a density of 10 % after some cold rounds of k-means."""
    found = {}
    for count in (1, 2, 5, 10, 50):
        errors = []
        for problem in problems:
            inner = _place(problem, layouts_for(problem.grid.num_tokens, count)["clusters"])
            mask = by_p(ErrorBudget)(ErrorAware()(*inner), 0.1)
            errors.append(errors_of(*inner[:3], mask, compensated=True))
        found[str(count)] = _mean(errors)["output_error"]
    return found


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic,captured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="take each n-th head")
    parser.add_argument("--layers", type=int, default=2, help="take each n-th layer")
    parser.add_argument("--problems", type=int, default=None, help="take the first n of each data")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--commit", default="", help="of the code, where git cannot tell")
    parser.add_argument("overrides", nargs="*", default=["recipe=demo"])
    options = parser.parse_intermixed_args(arguments)
    device = torch.device(options.device)
    start, data = time.monotonic(), {}
    for name in options.data.split(","):
        found = (
            synthetic(device, every=options.every)
            if name == "synthetic"
            else captured(
                device,
                options.overrides,
                clips=options.clips,
                every=options.every,
                layers=options.layers,
            )
        )
        problems = list(islice(found, options.problems))
        heads = sum(p.q.shape[1] for p in problems)
        data[name] = {
            "problems": len(problems),
            "heads": heads,
            "groups": [problem.group for problem in problems],
            "curves": curves(problems, options.densities),
            "correlations": correlations(problems),
            "rounds": rounds(problems),
        }
    command = shlex.join(["python", "-m", "gossamer.benchmarks.estimators", *arguments])
    results = {
        "header": environment(command, options.commit, device.type),
        "seconds": time.monotonic() - start,
        "densities": options.densities,
        "data": data,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "estimators.md", markdown(results))
    write_atomic(options.out / "estimators.json", json.dumps(results, indent=1) + "\n")
    plot(results, options.plot or options.out / "estimators.png")
    sys.stdout.write(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
