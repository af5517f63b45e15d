"""What a calibration takes on this machine: seconds, and the peak of memory beside the plan.

    python -m gossamer.benchmarks.calibration --shape 1.3b --latent 480p --samples 2 [KEY=VALUE ...]

Weights and clips are random, which changes neither. The settings are those of layout=per_head and
allocation=velocity unless others are given. A sample is one clip at one noise level; the processes
of a run share the samples, so a run of N samples on P of them takes N / P times as long as one.
"""

import argparse
import sys
import time
from typing import Any

import torch

from gossamer.benchmarks.training_step import LATENTS, SHAPES, config
from gossamer.sparse.attach import attach, method_from_spec
from gossamer.train.calibrate import Calibrator
from gossamer.train.config import build
from gossamer.train.gauge import Gauge
from gossamer.train.measures import Sample
from gossamer.train.memory import GIB, estimate_calibration
from gossamer.train.refusal import in_one_line

TEXT = (512, 4096)
SETTINGS = [
    "layout=per_head",
    "allocation=velocity",
    "compensation=gated_centroid",
    "calibration.clips=1",
    "evaluation.batch_size=1",
]


def calibrator(
    cfg: Any, latent: tuple[int, ...], text: tuple[int, int], device: torch.device
) -> Calibrator:
    """Return a calibrator of a dense model with random weights, one random clip at each level."""
    with device:
        teacher = attach(build(cfg.model).load(0), None).requires_grad_(False).eval()
        options, names = cfg.calibration, ("layout", "estimator", "policy", "compensation")
        samples = [
            Sample(
                level=level,
                x=torch.randn(1, *latent),
                t=torch.tensor([float(t)]),
                text=torch.randn(1, *text),
                condition=None,
                target=torch.randn(1, *latent),
            )
            for level, t in enumerate(options.noise_levels)
        ]
    spec = {name: cfg[name] for name in names} | {"backend": cfg.backend}
    return Calibrator(
        Gauge(
            teacher.to(device),
            method_from_spec(spec),
            samples,
            noise_levels=list(options.noise_levels),
            densities=list(options.densities),
            probes=options.probes,
            seed=0,
        )
    )


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--latent", choices=LATENTS, default="480p")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    levels = torch.linspace(0.9, 0.1, options.samples).tolist()
    more = [*SETTINGS, f"calibration.noise_levels={levels}", *options.overrides]
    cfg, latent = config(*more, shape=options.shape), LATENTS[options.latent]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = estimate_calibration(cfg, latent, TEXT, dtype=torch.bfloat16)
    sys.stdout.write(f"planned: {planned}\n")
    with torch.autocast(device.type, torch.bfloat16):
        for run in ("kernels compiled", "again"):
            one = calibrator(cfg, latent, TEXT, device)
            start = time.monotonic()
            one.run(build(cfg.allocation), sparsity=cfg.sparsity)
            seconds = time.monotonic() - start
            each = f"{seconds / options.samples:.1f} s a sample"
            sys.stdout.write(f"{run}: {options.samples} samples in {seconds:.1f} s, {each}\n")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        off = f"the plan is off by {planned.total / peak - 1:+.1%}"
        sys.stdout.write(f"measured: {peak / GIB:.1f} GiB at the peak; {off}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
