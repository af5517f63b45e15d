"""What `accelerate launch` asked for; refusals of what it would ignore or do otherwise, silently.

accelerate hands its flags on as environment variables. Sharding is done here (parallel.py), the
same on CPU and GPU: accelerate's becomes DDP on the CPU without a word, and reduces gradients in
bf16. Its context parallelism bypasses this package's attention.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from gossamer.train.refusal import Refusal

_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG")
# variable -> what it is called in accelerate's flags, the values allowed, and what to do instead
_FIXED = {
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", ("no",), "set compile=true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        ("1",),
        "set grad_accumulation",
    ),
    "ACCELERATE_USE_DEEPSPEED": ("use_deepspeed", ("false",), "launch with --use_fsdp"),
    "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", ("false",), "launch with --use_fsdp"),
}
_FIXED_FSDP = {
    "FSDP_VERSION": ("fsdp_version", ("2",), "add --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (
        "fsdp_offload_params",
        ("false",),
        "leave it out; teacher=offloaded saves a copy",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        ("false",),
        "set gradient_checkpointing=true",
    ),
    "FSDP_AUTO_WRAP_POLICY": (
        "fsdp_auto_wrap_policy",
        ("transformer_based_wrap",),
        "leave it out: each transformer block is one unit",
    ),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", (), "leave it out"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", ("true", "false"), "give one"),
}
_FIXED_SIZES = {
    "PARALLELISM_CONFIG_TP_SIZE": ("parallelism_config_tp_size", ("1",), "set it to 1"),
    "PARALLELISM_CONFIG_CP_SIZE": (
        "parallelism_config_cp_size",
        ("1",),
        "set sequence_parallel in the config instead",
    ),
    "PARALLELISM_CONFIG_SP_SIZE": (
        "parallelism_config_sp_size",
        ("1",),
        "set sequence_parallel in the config instead",
    ),
}


@dataclass(frozen=True)
class Launch:
    """How many processes there are, and how many of them share one copy of the weights."""

    processes: int = 1
    shard: int = 1
    reshard: bool = True  # drop a block's whole weights after its forward

    @classmethod
    def read(
        cls, env: Mapping[str, str] | None = None, command: Sequence[str] | None = None
    ) -> Self:
        """Read the environment of this process and its launcher's command line; Refusal if odd."""
        env = os.environ if env is None else env
        processes = int(env.get("WORLD_SIZE", 1))
        _check_command(_parent() if command is None else command, processes)
        _check_fixed(_FIXED, env)
        is_sharded = env.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if env.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
            _check_fixed(_FIXED_SIZES, env)
            if not is_sharded:
                allowed = "false without --use_fsdp"
                raise Refusal("use_parallelism_config", "true", allowed, "add --use_fsdp")
            shard = _shard_size(env, processes)
        else:
            shard = processes if is_sharded else 1
        if is_sharded:
            _check_fixed(_FIXED_FSDP, env)
        reshard = env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
        return cls(processes, shard, reshard)


@contextmanager
def sharding_hidden() -> Iterator[None]:
    """Let accelerate not see that sharding was asked for."""
    hidden = {name: os.environ.pop(name) for name in _SHARDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_fixed(
    fixed: Mapping[str, tuple[str, tuple[str, ...], str]], env: Mapping[str, str]
) -> None:
    for name, (flag, allowed, fix) in fixed.items():
        value = env.get(name)
        if value is not None and value.lower() not in allowed:
            raise Refusal(flag, value.lower(), " or ".join(allowed) or "nothing", fix)


def _shard_size(env: Mapping[str, str], processes: int) -> int:
    replicas, shard = (
        int(env.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", 1)) for name in ("REPLICATE", "SHARD")
    )
    if replicas * shard != processes:
        raise Refusal(
            "parallelism_config_dp_shard_size",
            shard,
            f"a size that makes dp_replicate_size {replicas} x dp_shard_size the {processes} "
            "processes",
            "correct one of them",
        )
    return shard


def _check_command(command: Sequence[str], processes: int) -> None:
    """Refuse flags of `accelerate launch` that it drops: nothing of them is in the environment."""
    started = _flag(command, "num_processes")
    if started is not None and started != processes:
        raise Refusal(
            "num_processes",
            started,
            f"{processes}, as many as accelerate started",
            "on the CPU give --multi_gpu with device=cpu: with --cpu it starts one",
        )
    steps = _flag(command, "gradient_accumulation_steps")
    if steps not in (None, 1):
        fix = f"accelerate ignores it; set grad_accumulation={steps}"
        raise Refusal("gradient_accumulation_steps", steps, "1", fix)


def _flag(command: Sequence[str], name: str) -> int | None:
    for word, after in pairwise([*command, ""]):
        if word in ("-m", "--module") and after.startswith("gossamer"):
            return None  # what follows are the run's own arguments
        key, equals, value = word.partition("=")
        if key in (f"--{name}", f"--{name.replace('_', '-')}"):
            text = value if equals else after
            return int(text) if text.isdecimal() else None
    return None


def _parent() -> list[str]:
    """Return the command line of the parent process where it is accelerate's launcher, else []."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # no /proc
        return []
    is_launcher = any("accelerate" in word for word in words[:3])
    return words if is_launcher else []
