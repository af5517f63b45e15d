"""The negative prompt's embedding: encoded once, kept beside the data that shares its encoder."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.train.config import build, data_dir
from gossamer.train.data.shards import Manifest
from gossamer.train.files import write_atomic
from gossamer.train.refusal import Refusal
from gossamer.train.text import TextEncoder

if TYPE_CHECKING:
    from omegaconf import DictConfig

NAME = "text"


def is_needed(cfg: "DictConfig") -> bool:
    """Return whether a run trains with the negative prompt."""
    return cfg.guidance.scale != 1 or cfg.guidance.negative_share > 0


def store_negative(cfg: "DictConfig", text: TextEncoder | None = None) -> None:
    """Encode the negative prompt with the data's text encoder, unless it is there or not needed."""
    from safetensors.torch import save

    file = _file(cfg)
    if not is_needed(cfg) or file.is_file():
        return
    text = build(cfg.text) if text is None else text
    manifest = Manifest.load(data_dir(cfg))
    if manifest is None or manifest.text["fingerprint"] != text.fingerprint:
        raise Refusal(
            "text",
            text.fingerprint,
            f"the encoder of the data in {data_dir(cfg)}",
            "give the text encoder that the data was encoded with",
        )
    embedding = text.encode([cfg.guidance.negative_prompt])[0]
    content = save({NAME: embedding.to("cpu", torch.bfloat16).contiguous()})
    try:
        write_atomic(file, content)
    except OSError as error:
        raise Refusal(
            "data.dir", file.parent, "a folder to write into", f"copy it: {error}"
        ) from error


def load_negative(cfg: "DictConfig") -> Tensor:
    """Return the embedding [L, dim] that `store_negative` wrote, fp32."""
    from safetensors.torch import load_file

    store_negative(cfg)
    return load_file(_file(cfg))[NAME].float()


def _file(cfg: "DictConfig") -> Path:
    prompt = hashlib.sha256(cfg.guidance.negative_prompt.encode()).hexdigest()[:16]
    return data_dir(cfg) / f"negative-{prompt}.safetensors"
