"""Where the dense transformer comes from, and how it is called."""

import json
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.train.refusal import Refusal

Condition = Literal["none", "first_frame"]
CONDITIONS = ("none", "first_frame")


class ModelSource(Protocol):
    """Makes the transformer of a run; teacher and student start from the same one."""

    condition: Condition

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments of the transformer, without reading weights."""

    def check_weights(self) -> None:
        """Refuse when the weights are not there; reads none of them."""

    def load(self, seed: int) -> nn.Module:
        """Return the transformer in fp32 on the CPU; `seed` matters for random weights only."""


class Pretrained:
    """A diffusers folder: a pipeline with transformer/ in it, or the transformer itself."""

    def __init__(self, *, path: str, condition: Condition = "none") -> None:
        self.path = Path(path)
        self.condition = _known_condition(condition)

    @property
    def folder(self) -> Path:
        """Return the folder with the transformer's config.json."""
        inner = self.path / "transformer"
        return inner if inner.is_dir() else self.path

    def config(self) -> dict[str, Any]:
        file = self.folder / "config.json"
        if not file.is_file():
            raise Refusal(
                "model.path",
                self.path,
                "a local diffusers folder with transformer/config.json",
                "download the weights first (e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers with "
                "`hf download ... --local-dir DIR`) and pass model.path=DIR",
            )
        return json.loads(file.read_text())

    def check_weights(self) -> None:
        if not any(self.folder.glob("*.safetensors")):
            raise Refusal(
                "model.path", self.path, "a folder with *.safetensors weights", "add the weights"
            )

    def load(self, seed: int) -> nn.Module:
        from diffusers import WanTransformer3DModel

        self.config()
        self.check_weights()
        return WanTransformer3DModel.from_pretrained(
            self.folder, local_files_only=True, torch_dtype=torch.float32
        )


class ScratchWan:
    """A Wan transformer with random weights: the start of a teacher."""

    def __init__(
        self,
        *,
        num_layers: int = 6,
        num_heads: int = 6,
        head_dim: int = 32,
        ffn_dim: int = 768,
        channels: int = 24,
        text_dim: int = 64,
        condition: Condition = "none",
    ) -> None:
        self.condition = _known_condition(condition)
        # freq_dim 128 and 64 rotary positions are enough for teachers of this size
        self._config = {
            "num_attention_heads": num_heads,
            "attention_head_dim": head_dim,
            "in_channels": channels * (2 if condition == "first_frame" else 1),
            "out_channels": channels,
            "text_dim": text_dim,
            "freq_dim": 128,
            "ffn_dim": ffn_dim,
            "num_layers": num_layers,
            "rope_max_seq_len": 64,
        }

    def config(self) -> dict[str, Any]:
        return {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], **self._config}

    def check_weights(self) -> None: ...

    def load(self, seed: int) -> nn.Module:
        from diffusers import WanTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WanTransformer3DModel(**self._config)


def velocity(
    transformer: nn.Module, x: Tensor, t: Tensor, text: Tensor, condition: Tensor | None
) -> Tensor:
    """Return the predicted velocity noise - latent, fp32, of noisy latents x [B, C, f, h, w].

    t [B] is the noise level in [0, 1]; text [B, L, dim]; condition is shaped as x.
    """
    hidden = x if condition is None else torch.cat([x, condition], dim=1)
    dtype: torch.dtype = transformer.patch_embedding.weight.dtype  # type: ignore[assignment]
    return transformer(
        hidden_states=hidden.to(dtype),
        timestep=t * 1000,
        encoder_hidden_states=text.to(dtype),
        return_dict=False,
    )[0].float()


def _known_condition(condition: str) -> Condition:
    if condition not in CONDITIONS:
        raise ValueError(
            f"condition={condition}: allowed is {' or '.join(CONDITIONS)}; set model.condition=none"
        )
    return condition  # type: ignore[return-value]
