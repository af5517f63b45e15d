"""When to cluster again: velocity error along a sampler's path against the number of clusterings.

    python -m gossamer.train.recluster_study recipe=demo [--steps 4 8 20] [--keep 0.0 0.2 1e9]
    python -m gossamer.train.recluster_study recipe=demo --out benchmarks/results/reclustering.md

SVG-EAR (`svg_ear` of sparse/methods.py) is attached to the dense model and follows the dense
sampler's own states, so that errors do not add up. `every step` clusters at each step; a number is
`layout.keep_until`, the growth of the probe error up to which labels are kept.
The data is encoded first, unless it is there.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import attach, attentions, detach
from gossamer.sparse.layouts.clusters import Clusters, SemanticClusters
from gossamer.sparse.methods import method_named
from gossamer.train.config import compose
from gossamer.train.job import Job, make_accelerator
from gossamer.train.model import velocity
from gossamer.train.noise import shift_levels
from gossamer.train.refusal import in_one_line
from gossamer.train.samples import evenly
from gossamer.train.stages import encode_stage
from gossamer.train.study_output import Line, add_output, environment, leave

State = tuple[Tensor, Tensor, Tensor]  # x, t and the dense velocity of a step


@in_one_line
def main(arguments: list[str]) -> int:
    """Print a Markdown table, clusterings and errors by rule; leave it with a plot at --out."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.train.recluster_study")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.0, 0.2, 1e9])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--clusters", type=int, nargs=2, default=[16, 60])
    parser.add_argument("--clips", type=int, default=2)
    add_output(parser)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    cfg = compose(options.overrides)
    job = Job(cfg, make_accelerator(cfg), [])
    encode_stage(job)
    model, dataset = detach(job.dense()), job.dataset("heldout")
    clips = [dataset[i] for i in evenly(len(dataset), options.clips)]
    inputs = [torch.stack([clip[name] for clip in clips]) for name in ("text", "condition")]
    text, condition = (x.to(job.device) for x in inputs)
    noise = torch.randn(clips[0]["latent"].shape, generator=torch.Generator().manual_seed(0))
    noise = noise.expand(len(clips), *noise.shape).to(job.device)
    num_q, num_kv = options.clusters
    base = method_named("svg_ear", options.sparsity)
    table = ["| steps | cluster again | clusterings | mean error | last error |", "|---" * 5 + "|"]
    sys.stdout.write("\n".join(table) + "\n")
    found: dict[str, list[float]] = {}
    with job.autocast(), torch.no_grad():
        for steps in options.steps:
            path = dense_path(model, noise, text, condition, steps, job.shift)
            for keep in (None, *options.keep):
                layout = SemanticClusters(num_q=num_q, num_kv=num_kv, keep_until=keep)
                own = replace(base, layout=layout)
                share, errors = follow(model, own, path, text, condition)
                rule = "every step" if keep is None else f"growth {keep:g}"
                mean = sum(errors) / len(errors)
                table.append(f"| {steps} | {rule} | {share:.0%} | {mean:.4f} | {errors[-1]:.4f} |")
                sys.stdout.write(table[-1] + "\n")
                found.setdefault(rule, []).append(mean)
    command = shlex.join(["python", "-m", "gossamer.train.recluster_study", *arguments])
    header = environment(command, options.commit, job.device.type)
    panels = {"SVG-EAR": {rule: Line(options.steps, errors) for rule, errors in found.items()}}
    y = "mean relative velocity error"
    leave(options, "When to cluster again", header, table, panels, x="steps of the sampler", y=y)
    return 0


def dense_path(
    model: nn.Module, x: Tensor, text: Tensor, condition: Tensor, steps: int, shift: float
) -> list[State]:
    """Return the states of the dense Euler sampler."""
    path = []
    for now, after in pairwise(shift_levels(torch.linspace(1, 0, steps + 1), shift).tolist()):
        t = torch.full((len(x),), now, device=x.device)
        path.append((x, t, velocity(model, x, t, text, condition)))
        x = x + (after - now) * path[-1][2]
    return path


def follow(
    model: nn.Module, method: Any, path: Sequence[State], text: Tensor, condition: Tensor
) -> tuple[float, list[float]]:
    """Return the share of layers and steps that clustered, and each step's relative error."""
    cluster, calls, errors = Clusters.cluster, 0, []

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return cluster(*args)

    attach(model, method)
    try:
        with patch.object(Clusters, "cluster", counted):
            for step, (x, t, dense) in enumerate(path):
                with model.cache_context("cond", step_index=step):
                    change = velocity(model, x, t, text, condition) - dense
                errors.append(float(change.norm() / dense.norm()))
        return calls / (len(path) * len(attentions(model))), errors
    finally:
        detach(model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
