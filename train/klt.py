"""The Karhunen-Loeve transform of patches: the numbers inside a fitted PCA codec."""

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

STD_FLOOR = 1e-3  # of the largest channel: a channel without variance must not amplify noise


@dataclass(frozen=True, eq=False)
class Klt:
    """latent = (basis . patch - mean) / scale; back: (latent * scale + mean) . basis + residual."""

    basis: Tensor  # [C, D], orthonormal rows
    mean: Tensor  # [C]
    scale: Tensor  # [C]
    residual: Tensor  # [D], the mean patch outside the basis

    @classmethod
    def solve(cls, mean: Tensor, covariance: Tensor, channels: int, power: float) -> Self:
        """From the mean [D] and covariance [D, D] of patches, fp64; see PCACodec for `power`."""
        variance, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors.flip(1)[:, :channels].T
        # eigenvectors have no sign: the largest entry is made positive, so that refits agree
        basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
        std = variance.flip(0)[:channels].clamp(min=0).sqrt()
        std = std.clamp(min=max(STD_FLOOR * float(std.max()), 1e-6))
        norm = std.pow(2 - 2 * power).mean().sqrt()
        projected = basis @ mean
        residual = mean - projected @ basis
        scale = std.pow(power) * norm
        return cls(basis.float().contiguous(), projected.float(), scale.float(), residual.float())

    def to(self, device: torch.device) -> Self:
        return type(self)(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.basis, self.mean, self.scale, self.residual

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
