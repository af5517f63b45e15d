"""The optimizers that a config can choose, and what checkpoints make of their states."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.train.check import preflight
from gossamer.train.checkpoint import load, save
from gossamer.train.config import build, compose
from gossamer.train.optimizer_state import load_optimizer, optimizer_tensors
from gossamer.train.optimizers import AdamW, AdamW8bit
from gossamer.train.refusal import Refusal
from gossamer.train.sizes import checkpoint_size


class Quantised(torch.optim.Optimizer):
    """Stands for bitsandbytes.optim.AdamW8bit: the same kinds of state, another update."""

    def __init__(self, params: Any, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": betas, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["state1"] = torch.zeros_like(parameter, dtype=torch.uint8)
                    state["qmap1"] = torch.linspace(-1, 1, 256)
                    state["absmax1"] = torch.zeros(-(-parameter.numel() // 256))
                state["step"] += 1
                scaled = parameter.grad / parameter.grad.abs().max()
                state["state1"] = ((scaled + 1) * 127).to(torch.uint8)
                state["absmax1"].fill_(float(parameter.grad.abs().max()))
                parameter.data -= group["lr"] * state["qmap1"][state["state1"].long()]


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `from bitsandbytes.optim import AdamW8bit` find the stand-in."""
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = Quantised  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(folder: Path, choice: AdamW) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of 4 steps, and of 2 steps, a checkpoint on disk and 2 more."""
    ends = []
    for stop in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 640)
        optimizer = choice.make([{"params": list(model.parameters())}])
        train(model, optimizer, range(2))
        if stop:
            tensors, state = optimizer_tensors(optimizer, model.named_parameters())
            groups = {"optimizer": tensors, "model": model.state_dict()}
            path = save(folder, 2, tensors=groups, state=state, keep=2)
            assert path is not None
            kept, state = load(path)
            model = nn.Linear(8, 640)
            model.load_state_dict(kept["model"])
            optimizer = choice.make([{"params": list(model.parameters())}])
            load_optimizer(optimizer, model.named_parameters(), kept["optimizer"], state)
        train(model, optimizer, range(2, 4))
        ends.append(dict(model.state_dict()))
    return ends[0], ends[1]


def test_the_old_keys_choose_adamw() -> None:
    chosen = build(compose(["optimizer.lr=2e-4", "optimizer.betas=[0.8,0.9]"]).optimizer)
    assert type(chosen) is AdamW and (chosen.lr, list(chosen.betas)) == (2e-4, [0.8, 0.9])
    weight = nn.Parameter(torch.ones(3))
    made = chosen.make([{"params": [weight]}])
    assert isinstance(made, torch.optim.AdamW) and type(made).__name__ == "AdamW"
    assert tuple(made.param_groups[0]["betas"]) == (0.8, 0.9)
    assert not made.param_groups[0]["fused"]  # on a CPU


def test_settings_that_are_forced_to_change_hold_after_a_resume() -> None:
    weight = nn.Parameter(torch.ones(3))
    named, groups = [("w", weight)], [{"params": [weight], "weight_decay": 0.1}]
    tensors, state = optimizer_tensors(AdamW().make(groups), named)
    now = AdamW(betas=(0.5, 0.6)).make([{"params": [weight], "weight_decay": 0.5}])
    load_optimizer(now, named, tensors, json.loads(json.dumps(state)))
    (group,) = now.param_groups
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.5, 0.6)


def test_a_state_of_codes_and_scales_resumes_bit_for_bit(
    tmp_path: Path, bitsandbytes: None
) -> None:
    whole, in_two = resumed(tmp_path, AdamW8bit())
    for name, tensor in whole.items():
        assert torch.equal(tensor, in_two[name]), name
    torch.manual_seed(0)
    assert not torch.equal(whole["weight"], nn.Linear(8, 640).weight)


def test_the_true_8_bit_optimizer_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole, in_two = resumed(tmp_path, AdamW8bit())
    for name, tensor in whole.items():
        assert torch.equal(tensor, in_two[name]), name


def test_the_bytes_of_the_true_8_bit_state_are_those_foretold() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(8, 640)  # 5120 weights in 8 bits, 640 biases in 32
    optimizer = AdamW8bit().make([{"params": list(model.parameters())}])
    train(model, optimizer, range(1))
    for parameter in model.parameters():
        held = sum(
            x.numel() * x.element_size()
            for name, x in optimizer.state[parameter].items()
            if isinstance(x, torch.Tensor) and not name.startswith("qmap")
        )
        assert held == AdamW8bit().state_bytes(parameter)


def test_the_size_of_a_checkpoint_is_told_for_its_optimizer() -> None:
    for optimizer, of_each in (("adamw", 4 + 8), ("adamw_8bit", 4 + 2 * (1 + 4 / 256))):
        said = checkpoint_size(compose([f"optimizer={optimizer}"]), 10**9)
        assert said.startswith(f"{of_each:.2f} GB each, up to 3 at once")


def test_the_state_of_one_optimizer_is_refused_by_another(bitsandbytes: None) -> None:
    weight = nn.Parameter(torch.ones(3))
    named = [("w", weight)]
    tensors, state = optimizer_tensors(AdamW().make([{"params": [weight]}]), named)
    other = AdamW8bit().make([{"params": [weight]}])
    with pytest.raises(Refusal, match="optimizer=Quantised: allowed is AdamW"):
        load_optimizer(other, named, tensors, json.loads(json.dumps(state)))
    del state["kind"]  # a checkpoint from before there was a choice
    load_optimizer(AdamW().make([{"params": [weight]}]), named, tensors, state)


def test_8_bits_without_bitsandbytes_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gossamer.train.optimizers.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    cfg = compose(
        [
            "recipe=demo",
            "optimizer=adamw_8bit",
            "device=cpu",
            f"data.dir={tmp_path}",
            f"runs_dir={tmp_path}",
        ]
    )
    for refuse in (
        lambda: preflight(cfg, ["encode", "train"]),
        lambda: AdamW8bit().make([{"params": [nn.Parameter(torch.ones(3))]}]),
    ):
        with pytest.raises(Refusal) as error:
            refuse()
        assert "optimizer=adamw_8bit" in str(error.value) and "\n" not in str(error.value)
        assert "pip install gossamer[eight-bit]" in str(error.value)


def test_sharded_parameters_are_refused_by_8_bits(bitsandbytes: None) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.device_mesh = "a mesh"  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match="allowed is adamw where parameters are sharded"):
        AdamW8bit().make([{"params": [weight]}])
