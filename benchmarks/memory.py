"""Tables of a training step's memory: planned for any machine, and on a GPU beside what it took."""

import argparse
import gc
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gossamer.benchmarks.training_step import (
    DENSE,
    LATENTS,
    SHAPES,
    Row,
    Step,
    check_only,
    config,
    measure,
)
from gossamer.train.files import write_atomic
from gossamer.train.memory import GIB, Memory, Split, estimate
from gossamer.train.refusal import in_one_line
from gossamer.train.study_output import environment, heading

TEXT = (512, 4096)
GPUS = 8
CACHED = ["teacher=cached", "noise_draws=16"]
ROWS = {
    "dense fine-tuning": DENSE,
    "sparse, frozen teacher": [],
    "sparse, offloaded teacher": ["teacher=offloaded"],
    "sparse, cached velocities": CACHED,
    "the same, averaged weights": [*CACHED, "ema=0.999"],
    "the same, 8-bit AdamW": [*CACHED, "optimizer=adamw_8bit"],
    "sparse, LoRA 64, shared teacher": ["lora.rank=64", "teacher=shared"],
    "dense fine-tuning, no checkpointing": [*DENSE, "gradient_checkpointing=false"],
    "sparse, cached velocities, no checkpointing": [*CACHED, "gradient_checkpointing=false"],
}
MEASURED = {
    "dense fine-tuning": DENSE,
    "sparse, frozen teacher": [],
    "sparse, frozen teacher, average": ["ema=0.999"],
    "sparse, cached velocities": CACHED,
    "sparse, tiles of 4 x 4 x 4, centroids": [
        "layout=tiles",
        "layout.block=[4,4,4]",
        "compensation=centroid",
        *CACHED,
    ],
    "sparse, sorted clusters": ["layout=sorted_clusters", *CACHED],
    "sparse, offloaded teacher": ["teacher=offloaded"],
    "sparse, LoRA 64, shared teacher": ["lora.rank=64", "teacher=shared"],
    "sparse, 8-bit AdamW": [*CACHED, "optimizer=adamw_8bit"],
}


def plan(cfg: Any, latent: tuple[int, ...]) -> Memory:
    return estimate(cfg, latent, TEXT, dtype=torch.bfloat16, clips=1)  # type: ignore[arg-type]


def planned() -> str:
    """Return tables of both models and sizes, one clip at a time."""
    lines = []
    sharded = Split(replicas=GPUS, shards=GPUS, teacher_sharded=True)
    for shape in ("1.3b", "14b"):
        for size, latent in LATENTS.items():
            tokens = latent[1] * latent[2] * latent[3] // 4
            lines += [
                f"### {shape.upper()}, {size}: {tokens:,} tokens",
                "",
                f"| GiB | one GPU | each of {GPUS}, FSDP2 | parts on one GPU |",
                "|---|---|---|---|",
            ]
            for name, more in ROWS.items():
                one = plan(config(*more, shape=shape), latent)
                parts = {n: b / GIB for n, b in one.parts.items() if b >= GIB / 10}
                said = ", ".join(f"{n} {gib:.1f}" for n, gib in parts.items())
                shared = f"{one.divided(sharded).total / GIB:.0f}"
                shared = "-" if "8-bit" in name else shared  # whose state cannot be sharded
                lines.append(f"| {name} | {one.total / GIB:.0f} | {shared} | {said} |")
                sys.stderr.write(f"{shape} {size} {lines[-1]}\n")
            lines.append("")
    return "\n".join(lines)


def compared(shape: str, latent: tuple[int, ...], only: str) -> Iterator[str]:
    """Yield a table of what steps took on the GPU beside what was planned, row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "| step | measured GiB | planned GiB | off by |\n|---|---|---|---|\n"
    for name, more in MEASURED.items():
        if only not in name:
            continue
        cfg = config(*more, shape=shape)
        total = plan(cfg, latent).total

        def make(cfg: Any = cfg) -> Step:
            return Step(cfg, latent, TEXT, device)

        yield _line(measure(name, make, total, steps=2)) + "\n"
        gc.collect()
        torch.cuda.empty_cache()


def _line(row: Row) -> str:
    if row.reason:
        return f"| {row.variant} | {row.reason} | {row.estimated / GIB:.1f} | - |"
    off = f"{row.estimated / row.peak - 1:+.1%}" if row.peak else "-"
    return f"| {row.variant} | {row.peak / GIB:.1f} | {row.estimated / GIB:.1f} | {off} |"


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="take steps on this GPU")
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="of what is measured")
    parser.add_argument("--latent", choices=LATENTS, default="480p", help="of what is measured")
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/memory.md"))
    options = parser.parse_args(arguments)
    check_only(parser, [options.only], MEASURED)
    command = shlex.join(["python", "-m", "gossamer.benchmarks.memory", *arguments])
    header = environment(command, options.commit)
    if options.measure:
        size = f"{options.shape.upper()} at {options.latent}"
        title = f"# Memory of a step, {size}: measured and planned"
        parts = compared(options.shape, LATENTS[options.latent], options.only)
    else:
        title, parts = "# Memory of a step: planned, not measured", iter([planned()])
    text = f"{title}\n\n{heading(header)}\n\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(text)
    for part in parts:
        text += part
        write_atomic(options.out, text)  # each row when it is there
        sys.stdout.write(part)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
