"""Video codecs: the fitted linear PCA codec, and a diffusers video VAE behind the same interface.

A video is float [B, 3, F, H, W] in [-1, 1]; latents are fp32 [B, C, f, h, w], normalised.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gossamer.train.geometry import check_size, check_video, from_patches, to_patches
from gossamer.train.klt import Klt
from gossamer.train.refusal import Refusal
from gossamer.train.weights import check_weights, load_whole

CONFIG_FILE = "config.json"
BASIS_FILE = "pca.safetensors"
FORMAT_VERSION = 1


class Codec(Protocol):
    """What encoding, training and evaluation need of a codec."""

    channels: int
    compression: tuple[int, int, int]  # frames, height, width per latent cell
    device: torch.device

    @property
    def fingerprint(self) -> str: ...

    def check_weights(self) -> None: ...
    def encode(self, video: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def save(self, folder: str | Path) -> None: ...
    def to(self, device: torch.device | str) -> Self: ...
    def valid_frames(self, frames: int) -> bool: ...
    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...


def load_codec(path: str | Path) -> Codec:
    """Open a saved codec folder of either kind."""
    match _read_config(Path(path)).get("_class_name"):
        case "PCACodec":
            return PCACodec(path=path)
        case "AutoencoderKLWan":
            return DiffusersVAECodec(path=path)
        case other:
            raise Refusal(
                f"{path}/{CONFIG_FILE} _class_name",
                other,
                "PCACodec or AutoencoderKLWan",
                "name a codec folder that gossamer or diffusers saved",
            )


class PCACodec:
    """Closed-form orthonormal KLT on t x h x w x RGB patches (spec: shared/spec/data.md, 4).

    latent_c = (basis_c . patch - mean_c) / scale_c, with scale_c = std_c ** power * norm and norm
    such that the latents have RMS 1. `power` = 1 whitens; at 0.5 the diffusion loss keeps some of
    the energy order, because a whitened teacher spends its loss on detail. Without `path` the codec
    is a specification that `gossamer encode` fits on the training clips.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        patch: tuple[int, int, int] = (2, 4, 4),
        channels: int = 24,
        power: float = 0.5,
    ) -> None:
        config = _read_config(Path(path)) if path is not None else {}
        sizes = [int(size) for size in config.get("patch", patch)]
        self.channels = int(config.get("channels", channels))
        self.power = float(config.get("power", power))
        if len(sizes) != 3 or min(sizes) < 1:
            raise Refusal("codec.patch", sizes, "three sizes >= 1", "use e.g. [2, 4, 4]")
        self.compression: tuple[int, int, int] = (sizes[0], sizes[1], sizes[2])
        values = 3 * sizes[0] * sizes[1] * sizes[2]
        if not 1 <= self.channels <= values:
            fix = f"a patch of {sizes} has that many values"
            raise Refusal("codec.channels", self.channels, f"1 to {values}", fix)
        if not 0.0 <= self.power <= 1.0:
            raise Refusal("codec.power", self.power, "0 to 1", "use 0.5, or 1 to whiten")
        self.device = torch.device("cpu")
        self._klt = None if path is None else self._load(Path(path), config)

    @classmethod
    def fit(
        cls,
        videos: Iterable[Tensor],
        *,
        patch: tuple[int, int, int] = (2, 4, 4),
        channels: int = 24,
        power: float = 0.5,
    ) -> Self:
        """Fit on videos, each [3, F, H, W] or [B, 3, F, H, W], read once and never kept."""
        codec = cls(patch=patch, channels=channels, power=power)
        count, total, outer = 0, torch.zeros(()), torch.zeros(())
        for video in videos:
            video = video if video.ndim == 5 else video[None]
            check_video(video, codec)
            rows = to_patches(video.double(), codec.compression).flatten(0, 3)  # [N, D]
            count, total, outer = count + rows.shape[0], total + rows.sum(0), outer + rows.T @ rows
        if count == 0:
            raise Refusal("videos", "none", "at least one clip", "give training clips to fit on")
        mean = total / count
        covariance = outer / count - torch.outer(mean, mean)
        codec._klt = Klt.solve(mean.cpu(), covariance.cpu(), codec.channels, codec.power)
        return codec.to(total.device)

    @property
    def is_fitted(self) -> bool:
        return self._klt is not None

    def check_weights(self) -> None:
        """Do nothing: the constructor has read them."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the specification and of the fitted numbers."""
        if self._klt is None:
            return "pca-unfitted"
        given = f"{self.compression} {self.channels} {self.power} {self._klt.digest()}"
        return f"pca-{hashlib.sha256(given.encode()).hexdigest()[:16]}"

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, F, H, W] -> latents [B, C, F/t, H/h, W/w]."""
        klt = self._fitted()
        check_video(video, self)
        with torch.autocast(self.device.type, enabled=False):
            patches = to_patches(video.to(self.device, torch.float32), self.compression)
            latents = (patches @ klt.basis.T - klt.mean) / klt.scale  # [B, f, h, w, C]
        return latents.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] -> video [B, 3, F, H, W], not clamped."""
        klt = self._fitted()
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            allowed = f"[B, {self.channels}, f, h, w]"
            raise Refusal(
                "latents.shape", tuple(latents.shape), allowed, "use this codec's latents"
            )
        with torch.autocast(self.device.type, enabled=False):
            cells = latents.to(self.device, torch.float32).permute(0, 2, 3, 4, 1)
            patches = (cells * klt.scale + klt.mean) @ klt.basis + klt.residual
        return from_patches(patches, self.compression)

    def save(self, folder: str | Path) -> None:
        """Write config.json (with latents_mean and latents_std) and pca.safetensors."""
        from safetensors.torch import save_file

        klt = self._fitted().to(torch.device("cpu"))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"basis": klt.basis.contiguous(), "residual": klt.residual}
        save_file(tensors, folder / BASIS_FILE)
        config = {
            "_class_name": "PCACodec",
            "format_version": FORMAT_VERSION,
            "patch": list(self.compression),
            "channels": self.channels,
            "power": self.power,
            "latents_mean": klt.mean.tolist(),
            "latents_std": klt.scale.tolist(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        self.device = torch.device(device)
        self._klt = None if self._klt is None else self._klt.to(self.device)
        return self

    def valid_frames(self, frames: int) -> bool:
        return frames >= 1 and frames % self.compression[0] == 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape [C, f, h, w] of one clip's latents."""
        check_size(frames, height, width, self)
        t, h, w = self.compression
        return self.channels, frames // t, height // h, width // w

    def _load(self, folder: Path, config: dict) -> Klt:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / BASIS_FILE)
            mean, scale = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
            klt = Klt(tensors["basis"], mean, scale, tensors["residual"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            allowed = f"a folder with {CONFIG_FILE} and {BASIS_FILE}"
            raise Refusal("codec.path", folder, allowed, f"fit again: {error}") from error
        values = 3 * self.compression[0] * self.compression[1] * self.compression[2]
        shapes = ((self.channels, values), (self.channels,), (self.channels,), (values,))
        for tensor, shape in zip(klt.tensors(), shapes, strict=True):
            if tuple(tensor.shape) != shape or not tensor.isfinite().all():
                given = f"numbers of shape {tuple(tensor.shape)}"
                raise Refusal("codec.path", folder, f"finite {shape}", f"fit again: it has {given}")
        return klt

    def _fitted(self) -> Klt:
        if self._klt is None:
            fix = "give path=, or run gossamer encode"
            raise Refusal("codec", "not fitted", "a fitted PCACodec", fix)
        return self._klt


class DiffusersVAECodec:
    """A diffusers AutoencoderKLWan, deterministic (posterior mode), normalised by its statistics.

    `path` is a pipeline folder (the VAE lies in `subfolder`) or the VAE's own folder. The VAE needs
    4k + 1 frames. Its decoder clamps to [-1, 1].
    """

    def __init__(self, *, path: str | Path, subfolder: str = "vae") -> None:
        from diffusers import AutoencoderKLWan

        inner = Path(path) / subfolder
        self._folder = inner if (inner / CONFIG_FILE).is_file() else Path(path)
        given = _read_config(self._folder)
        kind = given.get("_class_name", AutoencoderKLWan.__name__)
        if kind != AutoencoderKLWan.__name__:
            raise Refusal(
                "codec.path", self._folder, f"an {AutoencoderKLWan.__name__}", f"it holds a {kind}"
            )
        with torch.device("meta"):
            config = AutoencoderKLWan.from_config(given).config
        self.device = torch.device("cpu")
        self.channels = int(config.z_dim)
        time, space = int(config.scale_factor_temporal), int(config.scale_factor_spatial)
        self.compression = (time, space, space)
        self._mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)

    @cached_property
    def _vae(self) -> Any:
        """Return the VAE; its weights are read at the first use."""
        from diffusers import AutoencoderKLWan

        vae = load_whole(AutoencoderKLWan, self._folder, "codec.path").requires_grad_(False)
        vae.enable_slicing()  # one video at a time: a batch of long ones does not fit
        return vae.to(self.device)

    def check_weights(self) -> None:
        """Refuse when the weights are not there; reads none of them."""
        check_weights(self._folder, "codec.path")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every weight."""
        config = {key: value for key, value in self._vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return f"vae-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, F, H, W] -> latents [B, C, (F-1)/t + 1, H/h, W/w]."""
        check_video(video, self)
        with torch.autocast(self.device.type, enabled=False):
            posterior = self._vae.encode(video.to(self.device, self._vae.dtype)).latent_dist
        return (posterior.mode().float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] -> video [B, 3, F, H, W]."""
        raw = latents.to(self.device, torch.float32) * self._std + self._mean
        with torch.autocast(self.device.type, enabled=False):
            return self._vae.decode(raw.to(self._vae.dtype)).sample.float()

    def save(self, folder: str | Path) -> None:
        self._vae.save_pretrained(str(folder))

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        self.device = torch.device(device)
        if "_vae" in self.__dict__:
            self._vae.to(self.device)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        return self

    def valid_frames(self, frames: int) -> bool:
        return frames >= 1 and (frames - 1) % self.compression[0] == 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape [C, f, h, w] of one clip's latents."""
        check_size(frames, height, width, self)
        t, h, w = self.compression
        return self.channels, (frames - 1) // t + 1, height // h, width // w


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise Refusal(
            "codec.path", folder, f"a codec folder with {CONFIG_FILE}", f"check the path: {error}"
        ) from error
