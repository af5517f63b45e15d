"""From text and given frames to video: the sampler, the small pipeline, and loading an export."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer.sparse.attach import CONFIG_NAME, attach
from gossamer.train.codec import Codec, load_codec
from gossamer.train.condition import Condition, held_frames
from gossamer.train.files import write_atomic
from gossamer.train.lora import FILE
from gossamer.train.model import velocity
from gossamer.train.noise import shift_levels
from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords, TextEncoder

INDEX = "model_index.json"


@torch.no_grad()
def euler_sample(
    transformer: nn.Module,
    noise: Tensor,
    text: Tensor,
    condition: Tensor | None,
    *,
    steps: int,
    shift: float = 1.0,
    progress: str | None = None,
) -> Tensor:
    """Return latents [B, C, f, h, w]: Euler steps of the velocity from t = 1 (noise) to t = 0."""
    levels = shift_levels(torch.linspace(1, 0, steps + 1), shift).tolist()
    x = noise
    pairs = list(pairwise(levels))
    bar = tqdm(pairs, desc=progress, unit="step", disable=progress is None)
    for step, (now, after) in enumerate(bar):
        t = torch.full((len(x),), now, device=x.device)
        with transformer.cache_context("cond", step_index=step, sigma=now):
            x = x + (after - now) * velocity(transformer, x, t, text, condition)
    return x


class LatentVideoPipeline:
    """A transformer, a codec and a text encoder: what a run of the embedded codec exports."""

    def __init__(
        self,
        *,
        transformer: nn.Module,
        codec: Codec,
        text: TextEncoder,
        condition: Condition,
        shift: float = 1.0,
    ) -> None:
        self.transformer, self.codec, self.text = transformer, codec, text
        self.condition, self.shift = condition, shift

    def to(self, device: torch.device | str) -> Self:
        """Move transformer, codec and text encoder."""
        self.transformer.to(device)
        self.codec.to(device)
        self.text.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "",
        *,
        first_frame: Tensor | None = None,
        last_frame: Tensor | None = None,
        frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        steps: int = 20,
        seed: int = 0,
    ) -> Tensor:
        """Return a video [3, F, H, W] in [-1, 1]; the given frames [3, H, W] in [-1, 1].

        Height and width are those of the given frames, else 64 and 128. Raises Refusal when the
        model wants a frame that is not given, takes none that is, or a frame has another size.
        """
        device = next(self.transformer.parameters()).device
        given = self._given(first_frame=first_frame, last_frame=last_frame)
        height, width = _size(given, height, width)
        condition = None
        if given:
            held = held_frames(self.condition, given[0], given[-1], frames)
            condition = self.codec.encode(held[None].to(device))
        shape = self.codec.latent_shape(frames, height, width)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(1, *shape, generator=generator, device=device)
        latents = euler_sample(
            self.transformer,
            noise,
            self.text.encode([prompt]).to(device),
            condition,
            steps=steps,
            shift=self.shift,
            progress="sample",
        )
        return self.codec.decode(latents)[0].clamp(-1, 1)

    def _given(self, **frames: Tensor | None) -> list[Tensor]:
        """Return the frames that the model's condition holds, the first one first."""
        count = {"none": 0, "first_frame": 1, "first_last": 2}[self.condition]
        for place, (name, frame) in enumerate(frames.items()):
            if place < count and frame is None:
                fix = f"pass the {name.replace('_', ' ')}"
                raise Refusal(name, None, "a frame [3, H, W]", fix)
            if place >= count and frame is not None:
                allowed = f"None with a model of condition={self.condition}"
                raise Refusal(name, list(frame.shape), allowed, "leave it out")
        return [frame for frame in frames.values() if frame is not None]

    def save(self, folder: Path) -> None:
        """Write codec, text settings and index; the transformer is written by export."""
        if not isinstance(self.text, HashedWords):
            raise Refusal(
                "text", type(self.text).__name__, "HashedWords", "export a pipeline folder"
            )
        self.codec.save(folder / "codec")
        index = {
            "_class_name": type(self).__name__,
            "transformer": ["diffusers", type(self.transformer).__name__],
            "text": {"dim": self.text.dim, "length": self.text.length},
            "condition": self.condition,
            "shift": self.shift,
        }
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` and export wrote."""
        from diffusers import WanTransformer3DModel

        index = json.loads((folder / INDEX).read_text())
        return cls(
            transformer=WanTransformer3DModel.from_pretrained(
                folder / "transformer", local_files_only=True
            ).eval(),
            codec=load_codec(folder / "codec"),
            text=HashedWords(**index["text"]),
            condition=index["condition"],
            shift=index["shift"],
        )


def _size(given: list[Tensor], height: int | None, width: int | None) -> tuple[int, int]:
    """Return the video's height and width; Refusal where a given frame has another size."""
    own = given[0].shape[-2:] if given else (64, 128)
    height, width = own[0] if height is None else height, own[1] if width is None else width
    for name, frame in zip(("first_frame", "last_frame"), given, strict=False):
        if tuple(frame.shape) != (3, height, width):
            fix = "resize the frame, or leave height and width out to take those of the first"
            raise Refusal(name, list(frame.shape), f"a frame [3, {height}, {width}]", fix)
    return height, width


def load_pipeline(path: str | Path, **kwargs: Any) -> Any:
    """Load an exported folder with its sparse attention in place.

    A diffusers pipeline folder gives that pipeline (kwargs go to from_pretrained), a run of the
    embedded codec a LatentVideoPipeline, which takes none. Raises Refusal when the folder is no
    export of a whole model.
    """
    folder = Path(path)
    if (folder / FILE).is_file() and not (folder / INDEX).is_file():
        raise Refusal(
            "path",
            folder,
            "an export of a whole model, and this is a LoRA adapter of another",
            f"load the pipeline `pipe` of that model, then pipe.transformer.load_lora_adapter"
            f"('{folder}', use_safetensors=True) and gossamer.attach(pipe, '{folder}')",
        )
    for name in (INDEX, CONFIG_NAME):
        if not (folder / name).is_file():
            fix = "export a sparse run with `gossamer export` (a dense one loads in diffusers)"
            raise Refusal("path", folder, f"an export with {name}", fix)
    if json.loads((folder / INDEX).read_text())["_class_name"] == LatentVideoPipeline.__name__:
        if kwargs:
            name, value = next(iter(kwargs.items()))
            raise Refusal(
                name,
                value,
                "no argument for an export of the embedded codec",
                "leave it out; pipeline.to(device) moves it",
            )
        pipeline = LatentVideoPipeline.load(folder)
    else:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **kwargs)
    return attach(pipeline, folder)
