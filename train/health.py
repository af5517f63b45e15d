"""Steps that must not count: losses and gradients that are not finite, and jumps of the loss."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from gossamer.sparse.attach import attentions
from gossamer.train.distiller import Distiller
from gossamer.train.sharded import local

logger = logging.getLogger(__name__)

WINDOW = 100  # steps that the share of left out steps and the median loss are taken over
FEWEST = 20  # losses that a median needs before one is called a jump


class Health:
    """Judges each step by numbers that are equal in all processes, so that all judge alike.

    Part of the run's state: a resumed run judges as the unbroken one.
    """

    def __init__(self, max_skipped: int, loss_spike: float, skip_spikes: bool) -> None:
        self.max_skipped, self.loss_spike, self.skip_spikes = max_skipped, loss_spike, skip_spikes
        self.is_well = True  # at the step judged last: it counts
        self._skipped: list[int] = []
        self._losses: list[float] = []

    @property
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"skipped": list(self._skipped), "losses": list(self._losses)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._skipped, self._losses = list(state["skipped"]), list(state["losses"])

    @property
    def skipped(self) -> int:
        """Return how many of the last WINDOW steps were left out."""
        return len(self._skipped)

    @property
    def is_failing(self) -> bool:
        return self.skipped > self.max_skipped

    def judge(self, step: int, measured: Mapping[str, float]) -> str:
        """Say what is bad about a step (counted from 1), given its loss and norms; else nothing."""
        bad = next((f"{n}={v:g}" for n, v in measured.items() if not math.isfinite(v)), "")
        jump = "" if bad else self._jump(measured["loss"])
        self.is_well = not (bad or (jump and self.skip_spikes))
        self._skipped = [s for s in self._skipped if s > step - WINDOW]
        if not self.is_well:
            self._skipped.append(step)
        if math.isfinite(measured["loss"]):
            self._losses = [*self._losses, measured["loss"]][-WINDOW:]
        return bad or jump

    def _jump(self, loss: float) -> str:
        usual = median(self._losses) if len(self._losses) >= FEWEST else math.inf
        if not loss > self.loss_spike * usual:
            return ""
        return f"loss={loss:.4g} is over {self.loss_spike:g} times the median {usual:.4g}"


def tell(
    bad: str,
    step: int,
    distiller: Distiller,
    parts: Sequence[tuple[dict[str, Tensor], float]],
    dataset: Any,
    health: Health,
    accelerator: Accelerator,
) -> None:
    """Log which process, clips and tensor a bad step came from; all processes call it.

    `parts` are this process's batches of the step with their losses.
    """

    def size(part: tuple[Any, float]) -> float:
        return part[1] if math.isfinite(part[1]) else math.inf

    batch, loss = max(parts, key=size)
    where = ""
    if not health.is_well:
        with accelerator.autocast():  # shards in bf16 compute in nothing else
            where = where_not_finite(distiller, batch)
    clips = ", ".join(dataset.meta(int(i))["clip_id"] for i in batch["index"])
    process = f"process {accelerator.process_index}, clips {clips}"
    found = gather_object([(f"{process}: {where}" if where else process, loss)])
    if accelerator.is_main_process:
        worst = max(map(size, found))
        guilty = "; ".join(who for who, _ in filter(lambda one: size(one) == worst, found))
        done = "counted" if health.is_well else "left out in all processes"
        logger.warning("step %d is %s: %s (%s)", step, done, bad, guilty)


def where_not_finite(distiller: Distiller, batch: dict[str, Tensor]) -> str:
    """Name the first tensor with NaN or infinity: of the batch, teacher, student or gradients.

    Runs the forward again without gradients, so in a sharded model all processes must call it.
    Empty where all is finite, as after a fault that does not repeat.
    """
    found = [f"{name} of the batch" for name, tensor in batch.items() if _is_bad(tensor)]
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _watched(distiller, found.append),
    ):
        losses = distiller(batch)
    found += [f"loss {name}" for name, loss in losses.items() if _is_bad(loss)]
    if found:
        return found[0]
    # Backward runs from the last layer to the first: the last one by name is nearest its origin.
    bad = [n for n, p in distiller.student.named_parameters() if _is_bad(p.grad)]
    return f"gradient of {bad[-1]}" if bad else ""


@contextmanager
def _watched(distiller: Distiller, found: Callable[[str], None]) -> Iterator[None]:
    """Report, in the order of the forward, what is not finite in student and teacher."""
    handles = []

    def watch_inputs(layer: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name, tensor in zip("qkv", args, strict=False):
                if _is_bad(tensor):
                    found(f"{name} of {layer}")

        return look

    def watch_output(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(_is_bad(tensor) for tensor in tensors):
                found(f"output of {name}")

        return look

    for layer, attention in attentions(distiller.student).items():
        handles.append(attention.register_forward_pre_hook(watch_inputs(layer)))
    for name, module in distiller.student.named_modules():
        handles.append(module.register_forward_hook(watch_output(name or "the student")))
    teacher: Any = distiller.teacher
    velocity = getattr(teacher, "velocity", None)

    def judged(*args: Any) -> Tensor:
        output: Tensor = velocity(*args)  # type: ignore[misc]
        if _is_bad(output):
            found("velocity of the teacher")
        return output

    if teacher is not None:
        teacher.velocity = judged
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if teacher is not None:
            teacher.velocity = velocity


def _is_bad(tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    # without a word to other processes: some look, some do not
    return not bool(local(tensor).isfinite().all())
