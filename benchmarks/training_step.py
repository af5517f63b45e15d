"""Times the parts of a training step, dense and sparse, on a Wan of the size asked for.

Three steps: dense fine-tuning (flow matching), sparse distillation from a frozen teacher, and the
same from cached velocities. The objects are those of a run; weights and latents are random, which
changes no time: the masks keep a fixed share of blocks.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import attach, method_from_spec
from gossamer.train.compiling import compiled, no_silent_fallback
from gossamer.train.config import build, compose
from gossamer.train.distiller import Distiller
from gossamer.train.draws import Draws, Noised
from gossamer.train.files import write_atomic
from gossamer.train.loop import TrainSettings, mean_density
from gossamer.train.lora import add_adapters
from gossamer.train.memory import GIB, estimate
from gossamer.train.progress import Progress, parameter_groups
from gossamer.train.refusal import Refusal, in_one_line
from gossamer.train.study_output import environment, heading
from gossamer.train.teacher import Cached, Frozen, Offloaded, Shared

SHAPES = {
    "1.3b": ["model.num_layers=30", "model.num_heads=12", "model.ffn_dim=8960"],
    "14b": ["model.num_layers=40", "model.num_heads=40", "model.ffn_dim=13824"],
}
LATENTS = {"480p": (16, 21, 60, 104), "720p": (16, 21, 90, 160)}  # of 81 frames
BASE = [
    "model=scratch_wan",
    "model.head_dim=128",
    "model.channels=16",
    "model.text_dim=4096",
    "layout=row_major",
    "compensation=drop",
    "sparsity=0.95",
    "policy.k=0.05",
    "policy.p=0.0",
    "batch_size=1",
    "gradient_checkpointing=true",
]
DENSE = ["loss=flow_matching", "sparsity=0.0"]
VARIANTS = {
    "dense fine-tuning": DENSE,
    "sparse, frozen teacher": [],
    "sparse, cached velocities": ["teacher=cached", "noise_draws=1"],
}
PARTS = ("noise", "teacher", "forward", "backward", "optimizer", "average")
STUDENT = ("forward", "backward", "optimizer")
_WARM_UP = 2
_TOP = 40  # kernels in the table; the JSON has all


class Marks:
    """Times the spans between marks, with events on a GPU and the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        """End the span called `name`."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Return the spans in ms, and forget them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            span = start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)
            found[name] = found.get(name, 0.0) + span
        self._marks.clear()
        return found


class _Timed:
    """A teacher whose velocity is a span of its own."""

    def __init__(self, teacher: Any, marks: Marks) -> None:
        self._teacher, self._marks = teacher, marks

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        self._marks("noise")
        velocity: Tensor = self._teacher.velocity(student, noised)
        self._marks("teacher")
        return velocity


class _Recalled:
    """A velocity from the host's memory, in bf16, as the cache gives it."""

    def __init__(self, latent: tuple[int, ...], clips: int) -> None:
        self._velocity = torch.randn(clips, *latent).bfloat16()

    def velocity(self, student: nn.Module, noised: Noised) -> Tensor:
        return self._velocity.float().to(noised.x.device)


class Step:
    """One training step of a config, as the loop does it, on random weights and one batch."""

    def __init__(
        self,
        cfg: Any,
        latent: tuple[int, ...],
        text: tuple[int, int],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        weights: torch.dtype = torch.float32,
    ) -> None:
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.marks = Marks(device)
        clips = cfg.batch_size // cfg.grad_accumulation
        source = build(cfg.model)
        with device:  # where random weights take no time
            student = source.load(0)
        names = ("layout", "estimator", "policy", "compensation", "backend")
        spec = {name: cfg[name] for name in names}
        attach(student, method_from_spec(spec) if cfg.sparsity else None)
        if cfg.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        student.requires_grad_(True)
        if cfg.lora.rank:
            add_adapters(student, cfg.lora, 0)
        _cast(student, weights).to(device).train()
        compiled(student, cfg)
        loss = build(cfg.loss)
        teacher = self._teacher(source, latent, clips, weights) if loss.needs_teacher else None
        self.distiller = Distiller(
            student,
            None if teacher is None else _Timed(teacher, self.marks),  # type: ignore[arg-type]
            loss,
            Draws(levels=build(cfg.noise)),
        )
        groups = parameter_groups(student, TrainSettings(steps=1, batch_size=1))
        optimizer = build(cfg.optimizer).make(groups)
        self.progress = Progress(student, optimizer, controller=None, health=None)  # type: ignore[arg-type]
        if cfg.ema:
            self.progress.start_ema()
        self.batch = {
            "latent": torch.randn(clips, *latent, device=device),
            "text": torch.randn(clips, *text, device=device),
            "index": torch.arange(clips),
            "position": torch.arange(clips),
        }

    def _teacher(
        self, source: Any, latent: tuple[int, ...], clips: int, weights: torch.dtype
    ) -> Any:
        teacher = build(self.cfg.teacher)

        class Stub:  # of the job that starts a teacher
            cfg, device = self.cfg, self.device
            parallel = SimpleNamespace(
                place=lambda model: model.to(self.device), share_tokens=lambda model: None
            )

            def dense_on_cpu(self) -> nn.Module:
                with nullcontext() if isinstance(teacher, Offloaded) else self.device:
                    model: nn.Module = attach(source.load(0), None)
                return _cast(model.requires_grad_(False).eval(), weights)

            def guided(self, model: nn.Module) -> nn.Module:
                return model

        if isinstance(teacher, Cached):
            return _Recalled(latent, clips)
        assert isinstance(teacher, Frozen | Offloaded | Shared), teacher
        teacher.start(Stub())  # type: ignore[arg-type]
        return teacher

    def __call__(self) -> None:
        """Do the step: forward, backward, clipping and optimizer, average."""
        progress, cfg = self.progress, self.cfg
        self.marks("start")
        for _ in range(cfg.grad_accumulation):
            enabled = self.dtype != torch.float32
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
                losses = self.distiller(self.batch)
            self.marks("forward")
            (torch.stack(list(losses.values())).sum() / cfg.grad_accumulation).backward()
            self.marks("backward")
        trained = list(progress.named_parameters().values())
        nn.utils.clip_grad_norm_(trained, cfg.optimizer.clip)
        progress.optimizer.step()
        progress.optimizer.zero_grad(set_to_none=True)
        self.marks("optimizer")
        if progress.ema:
            progress.update_ema(cfg.ema)
        self.marks("average")


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model if dtype == torch.float32 else model.to(dtype)  # diffusers warns of any cast


@dataclass
class Row:
    """What one variant took: medians in ms, and bytes at the peak."""

    variant: str
    density: float
    ms: dict[str, float]
    peak: int
    estimated: int
    reason: str = ""
    kernels: list[tuple[str, float, int]] = field(default_factory=list)  # name, ms, calls

    @property
    def total(self) -> float:
        return sum(self.ms.values())

    @property
    def student(self) -> float:
        return sum(self.ms.get(part, 0.0) for part in STUDENT)


def measure(
    name: str,
    make: Callable[[], Step],
    estimated: int,
    steps: int,
    *,
    top_kernels: bool = False,
) -> Row:
    """Time `steps` steps after two that warm up; one that cannot run is a row as well."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        step = make()
        with no_silent_fallback():
            for _ in range(_WARM_UP):
                step()
                step.marks.take()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            spans = []
            for _ in range(steps):
                step()
                spans.append(step.marks.take())
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        ms = {part: statistics.median(s[part] for s in spans) for part in PARTS if part in spans[0]}
        density = mean_density(step.progress.student)
        return Row(name, density, ms, peak, estimated, kernels=kernels(step) if top_kernels else [])
    except (torch.OutOfMemoryError, Refusal) as error:
        return Row(name, 0.0, {}, 0, estimated, reason=str(error).partition(".")[0])


def kernels(step: Step) -> list[tuple[str, float, int]]:
    """Return the kernels of a step, most time first: name, ms, calls; of copies also who asked."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, record_shapes=True) as record:
        step()
        step.marks.take()
    on_gpu = step.device.type == "cuda"
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [e for e in record.key_averages() if not on_gpu or e.device_type.name == "CUDA"]
    found = [(e.key[:100], getattr(e, own) / 1000, e.count) for e in events]
    copies: dict[str, tuple[float, int]] = {}
    for event in record.events():
        if event.name == "aten::copy_" and getattr(event, own) > 0:
            callers: list[str] = []
            at = event.cpu_parent
            while at is not None and len(callers) < 4:
                callers.append(at.name[:40])
                at = at.cpu_parent
            name = f"copy of {event.input_shapes[0]} in {' in '.join(callers)}"
            ms, calls = copies.get(name, (0.0, 0))
            copies[name] = ms + getattr(event, own) / 1000, calls + 1
    found += [(name, ms, calls) for name, (ms, calls) in copies.items()]
    return sorted(found, key=lambda one: -one[1])


def markdown(rows: list[Row], header: dict[str, str], title: str) -> str:
    """Return the table of parts and the ratios to the dense step."""
    dense = next((row for row in rows if row.density == 1 and not row.reason), None)
    columns = ["step", "density", *PARTS, "total", "x dense: student, total"]
    columns += ["peak GiB", "estimate", "off by"]
    lines = [
        "# A training step",
        "",
        heading(header),
        "",
        f"{title} Medians in ms. Student: {', '.join(STUDENT)}.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        if row.reason:
            lines.append(f"| {row.variant} | {row.reason} |")
            continue
        cells = [row.variant, f"{row.density:.3f}"]
        cells += [f"{row.ms[part]:.0f}" if part in row.ms else "-" for part in PARTS]
        ratios = "-"
        if dense:
            ratios = f"{dense.student / row.student:.2f}, {dense.total / row.total:.2f}"
        cells += [f"{row.total:.0f}", ratios]
        off = f"{row.estimated / row.peak - 1:+.1%}" if row.peak else "-"
        cells += [f"{row.peak / GIB:.1f}", f"{row.estimated / GIB:.1f}", off]
        lines.append(f"| {' | '.join(cells)} |")
    for row in (row for row in rows if row.kernels):
        lines += ["", f"## {row.variant}", "", "| kernel | ms | calls |", "|---|---|---|"]
        top = row.kernels[:_TOP]
        lines += [f"| `{name}` | {ms:.2f} | {calls} |" for name, ms, calls in top]
    return "\n".join(lines) + "\n"


def config(*overrides: str, shape: str = "1.3b") -> Any:
    """Return a run on a Wan of random weights; overrides come last."""
    return compose([*BASE, *SHAPES[shape], *overrides])


def check_only(parser: argparse.ArgumentParser, parts: Iterable[str], names: Iterable[str]) -> None:
    """End the program unless each of the parts is one of a name."""
    for part in parts:
        if not any(part in name for name in names):
            parser.error(f"only={part}: allowed is a part of {', '.join(names)}; correct it")


@in_one_line
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--latent", default="480p", help=f"{', '.join(LATENTS)} or CxFxHxW")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", default="", help="parts of names, such as dense,cached")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="add the kernels of most time")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/training-step"))
    parser.add_argument("overrides", nargs="*", help="key=value, as of gossamer train")
    options = parser.parse_args(arguments)
    check_only(parser, options.only.split(","), VARIANTS)
    latent = LATENTS.get(options.latent) or tuple(map(int, options.latent.split("x")))
    text = (options.text, int(config(*options.overrides, shape=options.shape).model.text_dim))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = torch.bfloat16 if options.weights == "bf16" else torch.float32
    command = shlex.join(["python", "-m", "gossamer.benchmarks.training_step", *arguments])
    header = environment(command, options.commit)
    tokens = latent[1] * latent[2] * latent[3] // 4
    precision = f"{str(dtype)[6:]} autocast, {options.weights} weights"
    title = f"Wan {options.shape}, {tokens:,} tokens, {precision}, {' '.join(options.overrides)}"
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for name, more in VARIANTS.items():
        if not any(part in name for part in options.only.split(",")):
            continue
        cfg = config(*options.overrides, *more, shape=options.shape)
        clips = cfg.batch_size // cfg.grad_accumulation
        planned = estimate(cfg, latent, text, dtype=dtype, clips=clips, weights=weights)  # type: ignore[arg-type]

        def make(cfg: Any = cfg) -> Step:
            return Step(cfg, latent, text, device, dtype=dtype, weights=weights)

        rows.append(measure(name, make, planned.total, options.steps, top_kernels=options.profile))
        gc.collect()  # the step's hooks are cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        table = markdown(rows, header, f"{title}.")
        write_atomic(options.out / "training_step.md", table)
        found = {"header": header, "title": title, "rows": [asdict(row) for row in rows]}
        write_atomic(options.out / "training_step.json", json.dumps(found, indent=1) + "\n")
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
