"""Low-rank adapters on a transformer's linear layers (arXiv 2106.09685), through PEFT."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from gossamer.sparse.attach import attentions, family_of
from gossamer.train.refusal import Refusal
from gossamer.train.weights import digest

ADAPTER = "default"  # PEFT's name of the one adapter
PREFIX = "transformer"  # of its keys in a file, as diffusers' pipelines and load_lora_adapter want
FILE = "pytorch_lora_weights.safetensors"
_BASE = "_gossamer_base"


def check_peft(rank: int) -> None:
    """Refuse adapters where PEFT is not installed; imports nothing."""
    if find_spec("peft") is None:
        raise _refuse_peft(rank)


def adapted_layers(model: nn.Module, layers: str) -> dict[str, nn.Linear]:
    """Return the linear layers that get an adapter: of the self-attentions, or of whole blocks."""
    found = dict(family_of(model).self_attentions(model))
    roots = found if layers == "attention" else {name.partition(".")[0] for name in found}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name.startswith(f"{root}.") for root in roots)
        and "processor" not in name.split(".")  # of gossamer's attention: trained whole
    }


def count_parameters(model: nn.Module, options: DictConfig) -> int:
    """Return how many parameters the adapters of these options add."""
    layers = adapted_layers(model, options.layers).values()
    return sum(options.rank * (layer.in_features + layer.out_features) for layer in layers)


def add_adapters(model: nn.Module, options: DictConfig, seed: int) -> None:
    """Freeze an attached model, and add adapters that change nothing yet (B = 0).

    Adapters and mask parameters stay trainable.
    """
    weights = digest(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        insert_adapters(model, options)
    model.__dict__[_BASE] = weights


def insert_adapters(model: nn.Module, options: DictConfig) -> None:
    """Do what `add_adapters` does, also to one without weights; unseeded."""
    try:
        from peft import LoraConfig
    except ImportError as error:  # missing, or too old for the transformers that is there
        raise _refuse_peft(options.rank) from error
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        target_modules=list(adapted_layers(model, options.layers)),
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    for attention in attentions(model).values():
        attention.requires_grad_(True)


def base_of(model: nn.Module) -> str | None:
    """Return the digest of the weights below a model's adapters; None where it has none."""
    return model.__dict__.get(_BASE)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute with its base weights inside the block."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights below them, and take them out."""
    model.fuse_lora()
    model.unload_lora()
    model.__dict__.pop(_BASE, None)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter as diffusers reads it, with its rank and alpha in the file's metadata."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"{PREFIX}.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    config = getattr(model, "peft_config")[ADAPTER].to_dict()  # noqa: B009 (nn.Module's types)
    named = {f"{PREFIX}.{key}": _plain(value) for key, value in config.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(named, sort_keys=True)}
    save_file(tensors, folder / FILE, metadata=metadata)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read what `save_adapter` wrote into a model without adapters."""
    model.load_lora_adapter(str(folder), weight_name=FILE, prefix=PREFIX)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state without frozen parameters: all of it where nothing is frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def check_base(model: nn.Module, stored: str | None, path: Path) -> None:
    """Refuse a checkpoint whose adapters were trained on other weights than the model's."""
    if stored != base_of(model):
        raise Refusal(
            "checkpoint",
            path,
            f"adapters of the model's weights (SHA-256 {stored}, now {base_of(model)})",
            "use the model.path that it was trained with, or another run name",
        )


def _refuse_peft(rank: int) -> Refusal:
    allowed = "0 where peft is not installed, or too old"
    return Refusal("lora.rank", rank, allowed, "pip install gossamer[lora]")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
