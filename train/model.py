"""Where the dense transformer comes from, and how it is called."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.sparse.attach import families, family_of
from gossamer.train.condition import CONDITIONS, Condition
from gossamer.train.refusal import Refusal
from gossamer.train.weights import check_weights, load_whole, stamp

CONFIG_FILE = "config.json"
# Fused row and column reductions return gradients of a wrong shape for one clip on a GPU
# (pytorch/pytorch#178080).
INDUCTOR: dict[str, Any] = {"triton.mix_order_reduction": False}
TUNED: dict[str, Any] = {"coordinate_descent_tuning": True, "max_autotune_pointwise": True}


class ModelSource(Protocol):
    """Makes the transformer of a run; teacher and student start from the same one."""

    path: Path | None  # None: random weights
    condition: Condition

    @property
    def pipeline(self) -> Path | None:
        """Return the folder of the whole pipeline that the transformer is of, if there is one."""

    def stamp(self) -> str:
        """Return what tells pretrained weights from others at the same path, "" without any."""

    def skeleton(self) -> nn.Module:
        """Return the transformer on the meta device: its config and shapes, no weights."""

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

    @property
    def pipeline(self) -> Path | None:
        is_whole = all((self.path / part).is_dir() for part in ("transformer", "vae"))
        return self.path if is_whole else None

    def stamp(self) -> str:
        return stamp(self.folder)

    def skeleton(self) -> nn.Module:
        config, cls = self._read()
        try:
            with torch.device("meta"):
                return cls.from_config(config)
        except (TypeError, ValueError) as error:
            file = self.folder / CONFIG_FILE
            raise Refusal("model.path", file, f"a {cls.__name__}", f"mend it: {error}") from error

    def check_weights(self) -> None:
        check_weights(self.folder, "model.path")

    def load(self, seed: int) -> nn.Module:
        cls = self._read()[1]
        return load_whole(cls, self.folder, "model.path", exact=True, torch_dtype=torch.float32)

    def _read(self) -> tuple[dict[str, Any], Any]:
        """Return what config.json says, and the diffusers class that it names."""
        file = self.folder / CONFIG_FILE
        if not file.is_file():
            raise Refusal(
                "model.path",
                self.path,
                f"a local diffusers folder with transformer/{CONFIG_FILE}",
                "download it first (hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR) "
                "and give model.path=DIR",
            )
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            allowed = f"a {CONFIG_FILE} in JSON"
            raise Refusal("model.path", file, allowed, f"mend it: {error}") from error
        known = families()
        name = config.get("_class_name") if isinstance(config, dict) else None
        if name not in known:
            allowed = f"a folder whose {CONFIG_FILE} names {' or '.join(known)}"
            raise Refusal("model.path", self.path, allowed, f"it names {name}")
        return config, known[name].MODEL


class ScratchWan:
    """A Wan transformer with random weights: the start of a teacher."""

    path = None
    pipeline = None

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
        # freq_dim 128 is enough for teachers of this size, 128 rotary positions for 720p
        self._config = {
            "num_attention_heads": num_heads,
            "attention_head_dim": head_dim,
            "in_channels": channels * (1 if condition == "none" else 2),
            "out_channels": channels,
            "text_dim": text_dim,
            "freq_dim": 128,
            "ffn_dim": ffn_dim,
            "num_layers": num_layers,
            "rope_max_seq_len": 128,
        }

    def skeleton(self) -> nn.Module:
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            return WanTransformer3DModel(**self._config)

    def stamp(self) -> str:
        return ""

    def check_weights(self) -> None: ...

    def load(self, seed: int) -> nn.Module:
        from diffusers import WanTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return WanTransformer3DModel(**self._config)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the modules that hold a self-attention."""
    names = (name for name, _ in family_of(model).self_attentions(model))
    return [model.get_submodule(name.rpartition(".")[0]) for name in names]


def compile_blocks(model: nn.Module, *, tuned: bool = False) -> None:
    """Compile each transformer block in place; equal blocks share their code.

    `tuned`: Inductor times several tilings of each fused kernel, and takes the best.
    """
    for block in blocks_of(model):
        block.compile(options=INDUCTOR | TUNED if tuned else INDUCTOR)


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
