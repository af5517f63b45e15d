"""What ops share on the host: the choice of a backend, their operators, launch arithmetic."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor


def stands_for_gpu(device: torch.device) -> bool:
    """Return whether `auto` means a GPU's kernels: also for meta tensors, which only plan memory.

    Operators on meta tensors run their fakes: shapes as on a GPU, and nothing is computed.
    """
    return device.type in ("cuda", "meta")


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype
) -> Literal["reference", "triton"]:
    """Return the backend to run: `auto` is triton on CUDA (and meta), reference elsewhere.

    A name never falls back: ValueError says why it cannot run on the device.
    """
    if backend == "auto":
        backend = "triton" if stands_for_gpu(device) else "reference"
    if backend == "triton":
        check_triton(device, dtype)
        return "triton"
    if backend == "reference":
        return "reference"
    raise ValueError(
        f"backend must be 'auto', 'reference' or 'triton', got {backend!r}; leave it out for 'auto'"
    )


# torch.compile runs it once, while tracing: it reads Triton's settings, which cannot be traced.
@torch.compiler.assume_constant_result
def check_triton(device: torch.device, dtype: torch.dtype) -> None:
    try:
        import triton
    except ImportError:
        raise ValueError(
            "backend 'triton' needs the package triton, which is not installed; "
            "pip install 'triton>=3.6,<3.8' or use backend='reference'"
        ) from None
    if device.type == "meta":
        return
    if triton.knobs.runtime.interpret:
        if dtype == torch.bfloat16:
            raise ValueError(
                "dtype must be float32 or float16 under TRITON_INTERPRET=1, got torch.bfloat16, "
                "whose arithmetic the interpreter gets wrong; convert it to float32 or use a GPU"
            )
    elif device.type != "cuda":
        raise ValueError(
            f"device must be cuda for backend 'triton', got {device}; use backend='reference', or "
            "set TRITON_INTERPRET=1 before the start to run the kernels slowly on a CPU"
        )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make device current: Triton launches there, which need not be where the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def no_autocast(x: Tensor) -> torch.autocast:
    """Keep autocast away from the arithmetic on x; that of a meta tensor counts as the CPU's."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def unit_inner_stride(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where its last dimension has gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; triton.cdiv takes 2 us."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n; triton.next_power_of_2 takes 2 us."""
    return 1 << (n - 1).bit_length()


def define_operator(
    name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Make run, whose types give the schema, the PyTorch operator gossamer::name.

    As torch.library.custom_op would, with 9 us less host time a call: the operators of a block mask
    are so short that it would show. For functions that change no argument and return new tensors.
    """
    qualified = f"gossamer::{name}"
    torch.library.define(qualified, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.gossamer, name).default
