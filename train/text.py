"""Text encoders: prompts -> token embeddings [B, L, dim], zeros after the prompt's own tokens."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gossamer.train.refusal import Refusal
from gossamer.train.weights import check_weights, load_whole

WORD = re.compile(r"\w+")


class TextEncoder(Protocol):
    """What encoding and sampling need of a text encoder."""

    dim: int
    length: int

    @property
    def fingerprint(self) -> str: ...
    def check_weights(self) -> None: ...
    def encode(self, prompts: list[str]) -> Tensor: ...
    def to(self, device: torch.device | str) -> Self: ...


class HashedWords:
    """Each lower-case word is a seeded unit vector: no weights, for the demonstration and tests.

    Words past `length` are dropped; an empty prompt is all zeros.
    """

    def __init__(self, *, dim: int = 64, length: int = 16) -> None:
        if dim < 1 or length < 1:
            raise Refusal("text.dim, text.length", (dim, length), "both >= 1", "use e.g. 64 and 16")
        self.dim, self.length = dim, length
        self.device = torch.device("cpu")

    @property
    def fingerprint(self) -> str:
        return f"hashed-words-{self.dim}-{self.length}"

    def check_weights(self) -> None:
        """Do nothing: it has none."""

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> fp32 [B, length, dim]."""
        out = torch.zeros(len(prompts), self.length, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            for slot, word in zip(row, WORD.findall(prompt.lower()), strict=False):
                slot.copy_(self._word(word))
        return out.to(self.device)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) >> 1
        vector = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
        return vector / vector.norm()


class PipelineText:
    """Tokenizer and UMT5 text encoder of a diffusers pipeline folder, as WanPipeline uses them."""

    def __init__(self, *, path: str | Path, max_length: int = 512) -> None:
        self._folder = Path(path)
        for part in ("tokenizer", "text_encoder"):
            if not (self._folder / part).is_dir():
                raise Refusal(
                    "text.path",
                    self._folder,
                    f"a diffusers pipeline folder with {part}/",
                    "check the path",
                )
        try:
            config = json.loads((self._folder / "text_encoder" / "config.json").read_text())
            self.dim, self.length = int(config["d_model"]), max_length
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refusal(
                "text.path",
                self._folder,
                "a folder with text_encoder/config.json of a UMT5",
                f"check its files: {error!r}",
            ) from error
        self.device = torch.device("cpu")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self._folder / "tokenizer"
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise Refusal(
                "text.path", folder, "a folder with a tokenizer", f"check its files: {error}"
            ) from error

    @cached_property
    def _encoder(self) -> Any:
        """Return the UMT5 encoder; its weights are read at the first use."""
        from transformers import UMT5EncoderModel

        encoder = load_whole(
            UMT5EncoderModel, self._folder / "text_encoder", "text.path", dtype="auto"
        )
        return encoder.requires_grad_(False).to(self.device)

    def check_weights(self) -> None:
        """Refuse when the weights are not there; reads none of them."""
        check_weights(self._folder / "text_encoder", "text.path")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every weight, of the vocabulary and of the length."""
        digest = hashlib.sha256(f"{self.length}".encode())
        for word, number in sorted(self._tokenizer.get_vocab().items()):
            digest.update(f"{word}\0{number}\n".encode())
        for name, tensor in sorted(self._encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return f"umt5-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> [B, max_length, dim] in fp32, cleaned and padded like WanPipeline."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self._tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self._encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden.float() * tokens.attention_mask[..., None]

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if "_encoder" in self.__dict__:
            self._encoder.to(self.device)
        return self
