"""A distillation step of a 1.3B-shaped Wan on several GPUs: DDP, FSDP2, HSDP, Ulysses, one GPU.

    python -m gossamer.benchmarks.parallel --processes 2                  # minutes on two H200s
    python -m gossamer.benchmarks.parallel --processes 4 --modes single,hsdp,fsdp2+ulysses-2,links

Each mode is one `accelerate launch`. All take the same global batch, one clip for each process
(one process: in as many parts), so that losses and times compare. Weights and latents are random.
`links` measures the collectives alone; `kill` lets one process die and waits for the others.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from gossamer.sparse.attach import attach
from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor
from gossamer.sparse.policies import Hybrid
from gossamer.train.distiller import Distiller
from gossamer.train.draws import Draws
from gossamer.train.files import write_atomic
from gossamer.train.launch import Launch, sharding_hidden
from gossamer.train.losses import VelocityDistillation
from gossamer.train.model import ScratchWan, compile_blocks
from gossamer.train.noise import Uniform
from gossamer.train.optimizers import AdamW
from gossamer.train.parallel import Parallel
from gossamer.train.pulse import Pulse
from gossamer.train.refusal import in_one_line
from gossamer.train.study_output import environment, heading
from gossamer.train.teacher import Frozen

WARM_UP = 3  # steps that compile and allocate: their losses count, their times do not
MIB = 2**20
LINK_BYTES = (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
LINK_ROUNDS, LINK_REPEATS = 3, 10
FSDP = ["--use_fsdp", "--fsdp_version", "2"]


@dataclass(frozen=True)
class Shape:
    """A Wan transformer, and the latents and text of one clip."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    channels: int
    latent: tuple[int, int, int]  # frames, height, width
    text: tuple[int, int]  # tokens, width
    block: tuple[int, int]  # of q and kv tokens

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)

    def model(self, seed: int = 0) -> nn.Module:
        return ScratchWan(
            num_layers=self.layers,
            num_heads=self.heads,
            head_dim=self.head_dim,
            ffn_dim=self.ffn,
            channels=self.channels,
            text_dim=self.text[1],
        ).load(seed)


SHAPES = {
    "1.3b": Shape(30, 12, 128, 8960, 16, (21, 60, 104), (512, 4096), (128, 64)),
    "small": Shape(2, 12, 128, 1024, 16, (5, 32, 32), (64, 512), (128, 64)),
    "tiny": Shape(2, 4, 16, 64, 4, (2, 8, 8), (4, 16), (8, 4)),
}


@dataclass(frozen=True)
class Mode:
    """How the processes share the work: `single`, `ddp`, `fsdp2`, `hsdp`, each `+ulysses-N`."""

    name: str

    @property
    def base(self) -> str:
        return "ddp" if self.name.startswith("ulysses") else self.name.partition("+")[0]

    @property
    def sequence(self) -> int:
        found = self.name.partition("ulysses-")[2]
        return int(found) if found else 1

    def processes(self, asked: int) -> int:
        return 1 if self.base == "single" else asked

    def flags(self, processes: int) -> list[str]:
        """Return the flags of `accelerate launch`."""
        match self.base:
            case "single":
                return []
            case "ddp" | "links" | "kill":
                return ["--multi_gpu"]
            case "fsdp2":
                return FSDP
            case "hsdp":
                mesh = "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size"
                return [*FSDP, "--use_parallelism_config", *mesh.split(), str(processes // 2)]
        known = "single, ddp, fsdp2, hsdp, links, kill or ulysses-N, alone or as fsdp2+ulysses-N"
        raise ValueError(f"modes={self.name}: allowed is {known}; e.g. modes=single,ddp,ulysses-2")


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="GPUs")
    parser.add_argument("--modes", default="single,ddp,fsdp2,ulysses-2,links")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.3b")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=11, help=f"the first {WARM_UP} are not timed")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/parallel"))
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP:
        parser.error(f"steps={options.steps}: allowed is above {WARM_UP}; e.g. --steps 11")
    if options.worker is not None:
        return work(Mode(options.worker), options)
    modes = [Mode(name) for name in options.modes.split(",")]
    try:
        commands = [launch_command(mode, options, arguments) for mode in modes]
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    said = f"python -m gossamer.benchmarks.parallel {shlex.join(arguments)}"
    header = environment(said, options.commit)
    failed = 0
    for mode, command in zip(modes, commands, strict=True):
        start = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        sys.stderr.write(f"{mode.name}: {time.monotonic() - start:.0f} s, exit code {code}\n")
        if mode.base == "kill":
            _note_death(options.out, code)
        else:
            failed += code != 0
        write_atomic(options.out / "results.md", markdown(options.out, header, options))
    sys.stdout.write((options.out / "results.md").read_text())
    return 1 if failed else 0


def launch_command(mode: Mode, options: Any, arguments: list[str]) -> list[str]:
    """Return the `accelerate launch` of one mode."""
    processes = mode.processes(options.processes)
    flags = [*mode.flags(processes), "--num_processes", str(processes), "--num_machines", "1"]
    flags += ["--mixed_precision", options.precision, "--dynamo_backend", "no"]
    flags += ["--main_process_port", "0"] if processes > 1 else []
    flags += ["--cpu"] if options.device == "cpu" and processes == 1 else []
    module = ["-m", "gossamer.benchmarks.parallel", *arguments, "--worker", mode.name]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, *module]


def work(mode: Mode, options: Any) -> int:
    """Be one process of a mode; the first writes what was measured."""
    launch = Launch.read()
    patient = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
    with sharding_hidden():
        accelerator = Accelerator(cpu=options.device == "cpu", kwargs_handlers=[patient])
    with Pulse(accelerator):
        if mode.base == "links":
            found = links(accelerator)
        else:
            parallel = Parallel(accelerator, launch, mode.sequence)
            found = train(mode, options, accelerator, parallel)
    if accelerator.is_main_process:
        write_atomic(options.out / f"{mode.name}.json", json.dumps(found, indent=1))
    accelerator.end_training()
    return 0


def train(mode: Mode, options: Any, accelerator: Accelerator, parallel: Parallel) -> dict[str, Any]:
    """Do the steps; return losses, gradient norms, seconds of each step and peak memory."""
    shape, device = SHAPES[options.shape], accelerator.device
    method = SparseMethod(
        layout=RowMajor(q_block=shape.block[0], kv_block=shape.block[1]),
        estimator=MeanPool(),
        policy=Hybrid(k=1 - options.sparsity),
        compensation=Centroid(),
    )
    with device:
        # Another model's velocities: of its own the student is so near that rounding is the loss.
        student, dense = attach(shape.model(), method).train(), attach(shape.model(1), None)
    if not options.no_checkpointing:
        student.enable_gradient_checkpointing()
    if options.compile:
        compile_blocks(student)
    teacher = Frozen()
    teacher.model = parallel.place(dense.requires_grad_(False).eval())
    student = parallel.place(student)
    loss_of: Any = VelocityDistillation()
    distiller = Distiller(student, teacher, loss_of, Draws(levels=Uniform()))
    forward = parallel.wrap(distiller)
    parameters = list(student.parameters())
    optimizer = AdamW().make([{"params": parameters, "lr": 1e-5}])
    clips, parts = options.processes, options.processes // parallel.data_processes
    rows: list[list[float]] = []
    for step in range(options.steps):
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if mode.base == "kill" and step == 1 and accelerator.process_index == clips - 1:
            (options.out / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        first = step * clips + parallel.data_rank * parts
        batches = [_clip(shape, first + part, device) for part in range(parts)]
        start = _now(accelerator)
        total = torch.zeros((), device=device)
        for part, batch in enumerate(batches):
            with parallel.accumulating(forward) if part + 1 < parts else nullcontext():
                loss = torch.stack(list(forward(batch).values())).sum() / parts
                accelerator.backward(loss)
            total += loss.detach()
        parallel.average_whole(parameters)
        norm = parallel.norm(parameters)
        parallel.clip(parameters, norm, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = _now(accelerator) - start
        rows.append([float(accelerator.reduce(total, "mean")), float(norm), seconds])
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0))
    peaks = accelerator.gather(peak.to(device)[None]).tolist()
    of_steps = list(zip(*rows, strict=True))
    return {
        "processes": accelerator.num_processes,
        "clips": clips,
        "tokens": shape.tokens,
        "losses": of_steps[0],
        "norms": of_steps[1],
        "seconds": of_steps[2][WARM_UP:],
        "peak_bytes": max(peaks),
    }


def links(accelerator: Accelerator) -> dict[str, Any]:
    """Return the median seconds of each collective on buffers of these bytes in each process."""
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning)  # torch 2.13; not in 2.11
    size, device = accelerator.num_processes, accelerator.device
    found: dict[str, dict[int, float]] = {}
    sizes = LINK_BYTES if device.type == "cuda" else LINK_BYTES[:1]
    for count in sizes:
        whole = torch.zeros(count // 2, dtype=torch.bfloat16, device=device)
        other, share = torch.empty_like(whole), torch.zeros_like(whole[: whole.numel() // size])
        runs: dict[str, Callable[[], Any]] = {
            "all-to-all": partial(dist.all_to_all_single, other, whole),
            "all-gather": partial(dist.all_gather_into_tensor, other, share),
            "reduce-scatter": partial(dist.reduce_scatter_tensor, share, whole),
            "all-reduce": partial(dist.all_reduce, whole),
        }
        for name, run in runs.items():
            times = []
            for _ in range(LINK_ROUNDS):
                start = _now(accelerator)
                for _ in range(LINK_REPEATS):
                    run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / LINK_REPEATS)
            found.setdefault(name, {})[count] = statistics.median(times)
    return {"processes": size, "links": found}


def markdown(out: Path, header: dict[str, str], options: Any) -> str:
    """Return the tables of all modes whose results lie in the folder."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json"))}
    rows = {name: row for name, row in found.items() if "losses" in row}
    shape = SHAPES[options.shape]
    lines = [
        "# A distillation step on several GPUs",
        "",
        heading(header),
        "",
        f"Wan of {shape.layers} layers, {shape.heads} heads of {shape.head_dim}, {shape.tokens:,} "
        f"tokens a clip, random weights and latents; sparsity {options.sparsity}; precision "
        f"{options.precision}; frozen dense teacher. A step is a global batch: teacher, forward, "
        "backward, clipping, AdamW. Efficiency is to one GPU on the same batch.",
        "",
        "| mode | GPUs | clips | losses of steps 1, 2, 3 | furthest loss from single | step s "
        "(20-80 %) | tokens/s | speed-up | efficiency | peak GiB |",
        "|" + "---|" * 10,
    ]
    order = sorted(rows, key=lambda name: (rows[name]["processes"], name))
    lines += [_row(name, rows[name], rows.get("single")) for name in order]
    for name, row in found.items():
        if "links" in row:
            lines += ["", *_link_table(row)]
        if name == "kill":
            lines += [
                "",
                "One of the processes killed: all had ended "
                f"{row['seconds_to_end']:.1f} s later, exit code {row['code']}.",
            ]
    return "\n".join([*lines, ""])


def _row(name: str, row: dict[str, Any], single: dict[str, Any] | None) -> str:
    median, low, high = _spread(row["seconds"])
    away = speed = efficiency = "-"
    if single is not None and single["clips"] == row["clips"]:
        pairs = zip(row["losses"], single["losses"], strict=False)
        away = f"{max(abs(a / b - 1) for a, b in pairs):.1e}"
        ratio = statistics.median(single["seconds"]) / median
        speed, efficiency = f"{ratio:.2f}", f"{ratio / row['processes']:.0%}"
    losses = ", ".join(f"{loss:.6g}" for loss in row["losses"][:3])
    cells = [
        name,
        str(row["processes"]),
        str(row["clips"]),
        losses,
        away,
        f"{median:.3f} ({low:.3f}-{high:.3f})",
        f"{row['clips'] * row['tokens'] / median:,.0f}",
        speed,
        efficiency,
        f"{row['peak_bytes'] / 2**30:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _link_table(row: dict[str, Any]) -> list[str]:
    size = row["processes"]
    counts = list(next(iter(row["links"].values())))
    lines = [
        f"Collectives of {size} processes, bf16: GB/s that each sends, (P - 1) / P of the bytes "
        "(all-reduce: twice that) over the time, for a buffer of the given size.",
        "",
        "| | " + " | ".join(f"{int(count) // MIB} MiB" for count in counts) + " |",
        "|" + "---|" * (1 + len(counts)),
    ]
    for name, times in row["links"].items():
        share = (size - 1) / size * (2 if name == "all-reduce" else 1)
        rates = (f"{int(count) * share / seconds / 1e9:.1f}" for count, seconds in times.items())
        lines.append(f"| {name} | {' | '.join(rates)} |")
    return lines


def _spread(seconds: list[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def _note_death(out: Path, code: int) -> None:
    killed = out / "killed"
    if killed.is_file():
        took = time.time() - float(killed.read_text())
        killed.unlink()
        found = {"seconds_to_end": took, "code": code}
        write_atomic(out / "kill.json", json.dumps(found))


def _clip(shape: Shape, number: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    latent = torch.randn(1, shape.channels, *shape.latent, generator=generator)
    text = torch.randn(1, *shape.text, generator=generator)
    position = torch.tensor([number])
    return {
        "latent": latent.to(device),
        "text": text.to(device),
        "index": position,
        "position": position,
    }


def _now(accelerator: Accelerator) -> float:
    """Return the time when all processes have come here and their GPUs are done."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
