"""What `accelerate launch` asks for is done or refused, never ignored."""

import sys
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer.train.check import preflight
from gossamer.train.config import compose
from gossamer.train.launch import Launch, sharding_hidden
from gossamer.train.refusal import Refusal

CONFIGS = Path(gossamer.__file__).with_name("recipes") / "accelerate"
TWO = {"WORLD_SIZE": "2"}
FSDP = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
MESH = {
    **FSDP,
    "WORLD_SIZE": "8",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def read(env: dict[str, str], command: str = "") -> Launch:
    return Launch.read(env, command.split())


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, Launch(1, 1)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Launch(1, 1)),
        (TWO, Launch(2, 1)),
        (FSDP, Launch(2, 2)),
        (MESH, Launch(8, 2)),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, Launch(2, 2, reshard=False)),
        ({**FSDP, "ACCELERATE_DYNAMO_BACKEND": "NO"}, Launch(2, 2)),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, Launch(2, 2)),
    ],
)
def test_what_is_done(env: dict[str, str], launch: Launch) -> None:
    assert read(env) == launch


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version=1: allowed is 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true: allowed is false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set gradient_checkpointing=true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy=size_based_wrap"),
        ({"FSDP_IGNORED_MODULES": "blocks.0"}, "fsdp_ignored_modules=blocks.0: allowed is nothing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "allowed is true or false"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=inductor: allowed is no"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set grad_accumulation"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "use_deepspeed=true: allowed is false"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm=true: allowed is false"),
        ({**MESH, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "set sequence_parallel in the config"),
        ({**MESH, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "set sequence_parallel in the config"),
        ({**MESH, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size=2: allowed is 1"),
        ({**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "dp_replicate_size 4 x dp_shard_size"),
        ({**MESH, "ACCELERATE_USE_FSDP": "false"}, "add --use_fsdp"),
    ],
)
def test_what_is_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read({**FSDP, **env})
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python accelerate launch --cpu --num_processes 2 -m gossamer.train", "num_processes=2"),
        ("python accelerate launch --cpu --num-processes=2 -m gossamer.train", "num_processes=2"),
        (
            "python accelerate launch --gradient_accumulation_steps 4 -m gossamer.train",
            "accelerate ignores it; set grad_accumulation=4",
        ),
    ],
)
def test_flags_that_accelerate_drops_are_refused(command: str, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        read({}, command)


def test_the_arguments_of_the_run_are_not_taken_for_flags() -> None:
    command = "python accelerate launch --num_processes 2 -m gossamer.train --num_processes 9"
    assert read(TWO, command) == Launch(2)


def test_accelerate_does_not_see_the_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with sharding_hidden():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize(
    ("gpus", "machines", "kind"), [(1, 1, "NO"), (8, 1, "FSDP"), (64, 8, "FSDP")]
)
def test_accelerate_reads_the_example_configs(gpus: int, machines: int, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{gpus}-gpu.yaml"))
    assert (config.num_processes, config.num_machines) == (gpus, machines)
    assert config.distributed_type.value == kind and config.mixed_precision == "bf16"


@pytest.mark.parametrize("gpus", [8, 64])
def test_the_example_configs_reach_the_processes_as_shards(
    gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(sys, "argv", ["accelerate"])
    file = str(CONFIGS / f"{gpus}-gpu.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, "-m", "gossamer.train"])
    env = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    assert read({**env, "WORLD_SIZE": str(gpus)}) == Launch(gpus, 8)


@pytest.mark.parametrize(
    ("processes", "settings", "said"),
    [
        (1, {"sequence_parallel": 0}, "a whole number of at least 1"),
        (2, {"sequence_parallel": 4}, "a divisor of the 2 processes"),
        (3, {"sequence_parallel": 3}, "a divisor of the 2 heads"),
        (3, {"sequence_parallel": 2}, "a divisor of the 3 processes"),
        (4, {"sequence_parallel": 2, "batch_size": 3}, "set batch_size=4"),
        (2, {"sequence_parallel": 2, "evaluation__every": 5}, "0 where processes share a model"),
    ],
)
def test_a_clip_that_cannot_be_shared_is_refused(
    processes: int,
    settings: dict[str, int],
    said: str,
    lab: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(Refusal, match=said):
        preflight(compose(lab.student(tmp_path, **settings)), ["train"])
