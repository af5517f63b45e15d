"""Video codecs: the fitted linear PCA codec, and a diffusers video VAE behind the same interface.

A video is float [B, 3, F, H, W] in [-1, 1]; latents are fp32 [B, C, f, h, w], normalised.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from gossamer.train.geometry import check_size, check_video, from_patches, to_patches
from gossamer.train.refusal import Refusal

CONFIG_FILE = "config.json"
BASIS_FILE = "pca.safetensors"
FORMAT_VERSION = 1
STD_FLOOR = 1e-3  # of the largest channel: a channel without variance must not amplify noise


class Codec(Protocol):
    """What encoding, training and evaluation need of a codec."""

    channels: int
    compression: tuple[int, int, int]  # frames, height, width per latent cell
    fingerprint: str
    device: torch.device

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
        patch = tuple(int(size) for size in config.get("patch", patch))
        self.channels = int(config.get("channels", channels))
        self.power = float(config.get("power", power))
        if len(patch) != 3 or min(patch) < 1:
            raise Refusal("codec.patch", patch, "three sizes >= 1", "use e.g. [2, 4, 4]")
        self.compression: tuple[int, int, int] = patch
        values = 3 * patch[0] * patch[1] * patch[2]
        if not 1 <= self.channels <= values:
            raise Refusal(
                "codec.channels",
                self.channels,
                f"1 to {values}",
                f"patch {patch} has that many values",
            )
        if not 0.0 <= self.power <= 1.0:
            raise Refusal("codec.power", self.power, "0 to 1", "use 0.5, or 1 to whiten")
        self.device = torch.device("cpu")
        self._basis = self._mean = self._scale = self._residual = None
        if path is not None:
            self._load(Path(path), config)

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
        codec._solve(mean.cpu(), covariance.cpu())
        return codec.to(total.device)

    @property
    def is_fitted(self) -> bool:
        return self._basis is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the specification and of the fitted numbers."""
        digest = hashlib.sha256(repr((self.compression, self.channels, self.power)).encode())
        for tensor in (self._basis, self._mean, self._scale, self._residual):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
        return f"pca-{digest.hexdigest()[:16]}" if self.is_fitted else "pca-unfitted"

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, F, H, W] -> latents [B, C, F/t, H/h, W/w]."""
        basis, mean, scale, _ = self._fitted()
        check_video(video, self)
        patches = to_patches(video.to(self.device, torch.float32), self.compression)
        latents = (patches @ basis.T - mean) / scale  # [B, f, h, w, C]
        return latents.permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] -> video [B, 3, F, H, W], not clamped."""
        basis, mean, scale, residual = self._fitted()
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise Refusal(
                "latents.shape",
                tuple(latents.shape),
                f"[B, {self.channels}, f, h, w]",
                "use this codec's",
            )
        cells = latents.to(self.device, torch.float32).permute(0, 2, 3, 4, 1)
        return from_patches((cells * scale + mean) @ basis + residual, self.compression)

    def save(self, folder: str | Path) -> None:
        """Write config.json (with latents_mean and latents_std) and pca.safetensors."""
        from safetensors.torch import save_file

        basis, mean, scale, residual = (tensor.cpu() for tensor in self._fitted())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"basis": basis.contiguous(), "residual": residual}, folder / BASIS_FILE)
        config = {
            "_class_name": "PCACodec",
            "format_version": FORMAT_VERSION,
            "patch": list(self.compression),
            "channels": self.channels,
            "power": self.power,
            "latents_mean": mean.tolist(),
            "latents_std": scale.tolist(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        self.device = torch.device(device)
        for name in ("_basis", "_mean", "_scale", "_residual"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(self.device))
        return self

    def valid_frames(self, frames: int) -> bool:
        return frames >= 1 and frames % self.compression[0] == 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape [C, f, h, w] of one clip's latents."""
        check_size(frames, height, width, self)
        t, h, w = self.compression
        return self.channels, frames // t, height // h, width // w

    def _solve(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the leading eigenvectors of a covariance, [D] and [D, D] in fp64."""
        variance, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors.flip(1)[:, : self.channels].T  # [C, D]
        # eigenvectors have no sign: the largest entry is made positive, so that refits agree
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * largest.sign()
        std = variance.flip(0)[: self.channels].clamp(min=0).sqrt()
        std = std.clamp(min=max(STD_FLOOR * float(std.max()), 1e-6))
        norm = std.pow(2 - 2 * self.power).mean().sqrt()
        projected_mean = basis @ mean
        self._basis = basis.float()
        self._mean = projected_mean.float()
        self._scale = (std.pow(self.power) * norm).float()
        self._residual = (mean - projected_mean @ basis).float()  # the mean outside the basis

    def _load(self, folder: Path, config: dict) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / BASIS_FILE)
            self._basis, self._residual = tensors["basis"], tensors["residual"]
            self._mean = torch.tensor(config["latents_mean"], dtype=torch.float32)
            self._scale = torch.tensor(config["latents_std"], dtype=torch.float32)
        except (OSError, SafetensorError, KeyError) as error:
            raise Refusal(
                "codec.path",
                folder,
                f"a folder with {CONFIG_FILE} and {BASIS_FILE}",
                f"fit again: {error}",
            ) from error
        values = 3 * self.compression[0] * self.compression[1] * self.compression[2]
        expected = {"basis": (self.channels, values), "residual": (values,)}
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape or not tensors[name].isfinite().all():
                raise Refusal(
                    f"codec {name}", tuple(tensors[name].shape), f"finite {shape}", "fit again"
                )

    def _fitted(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._basis is None:
            raise Refusal(
                "codec", "not fitted", "a fitted PCACodec", "give path=, or run gossamer encode"
            )
        return self._basis, self._mean, self._scale, self._residual


class DiffusersVAECodec:
    """A diffusers AutoencoderKLWan, deterministic (posterior mode), normalised by its statistics.

    `path` is a pipeline folder (the VAE lies in `subfolder`) or the VAE's own folder. The VAE needs
    4k + 1 frames. Its decoder clamps to [-1, 1].
    """

    def __init__(self, *, path: str | Path, subfolder: str = "vae") -> None:
        from diffusers import AutoencoderKLWan

        folder = Path(path) / subfolder
        folder = folder if (folder / CONFIG_FILE).is_file() else Path(path)
        _read_config(folder)
        try:
            vae = AutoencoderKLWan.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise Refusal(
                "codec.path",
                folder,
                "a folder with an AutoencoderKLWan",
                f"check its files: {error}",
            ) from error
        self._vae = vae.eval().requires_grad_(False)
        self.device = torch.device("cpu")
        self.channels = int(vae.config.z_dim)
        time, space = int(vae.config.scale_factor_temporal), int(vae.config.scale_factor_spatial)
        self.compression = (time, space, space)
        self._mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

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
        posterior = self._vae.encode(video.to(self.device, self._vae.dtype)).latent_dist
        return (posterior.mode().float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w] -> video [B, 3, F, H, W]."""
        raw = latents.to(self.device, torch.float32) * self._std + self._mean
        return self._vae.decode(raw.to(self._vae.dtype)).sample.float()

    def save(self, folder: str | Path) -> None:
        self._vae.save_pretrained(str(folder))

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        self.device = torch.device(device)
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
