"""torch.compile in a run: never eager code instead without a word, and what a process forgets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from torch import nn

from gossamer.train.config import fingerprint
from gossamer.train.model import compile_blocks
from gossamer.train.refusal import Refusal

if TYPE_CHECKING:
    from gossamer.train.job import Job

# Variants of one function: with and without gradients, adapters on and off, a few clip sizes.
# Beyond its own limit of 8 dynamo runs what no variant fits eagerly, with one warning.
MOST_VARIANTS = 64
# What decides the variants; masks do not, since attention is outside of the compiled code.
DECIDING = (
    *("model", "data", "codec", "text", "lora", "teacher", "guidance"),
    *("batch_size", "grad_accumulation", "gradient_checkpointing", "evaluation.batch_size"),
)


def compiled(model: nn.Module, cfg: DictConfig) -> nn.Module:
    """Return the model, its blocks compiled where the config says so."""
    if cfg.compile:
        compile_blocks(model, tuned=cfg.compile_tuned)
    return model


@contextmanager
def compiling(job: "Job") -> Iterator[None]:
    """Let the blocks of a stage compile; jobs of one process share code where it can fit.

    Raises Refusal where a function would have more than MOST_VARIANTS variants.
    """
    if not job.cfg.compile:
        yield
        return
    import torch._dynamo

    key, deciding = ("compiled",), fingerprint(job.cfg, DECIDING)
    if job.kept is not None and job.kept.get(key) != deciding:
        torch._dynamo.reset()
        job.kept[key] = deciding
    with no_silent_fallback():
        yield


@contextmanager
def no_silent_fallback(most: int = MOST_VARIANTS) -> Iterator[None]:
    """Refuse a function's next variant after `most`, where dynamo would run it eagerly."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with config.patch(recompile_limit=most, fail_on_recompile_limit_hit=True):
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise Refusal(
                "compile",
                "true",
                f"false where a function of the blocks needs more than {most} variants",
                "set compile=false; TORCH_LOGS=recompiles says what differs",
            ) from error
