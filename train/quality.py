"""How like two videos are: PSNR, SSIM, PSNR of the change between frames, and optional programs.

Videos are uint8 [B, F, H, W, 3]; every measure gives one number a clip. Higher is more alike, but
for FLIP, a distance.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.train.refusal import Refusal

MEASURES = ("psnr", "ssim", "temporal_psnr")
FLIP_FRAMES = 2  # of a clip, spread evenly
VMAF_AT_ONCE = 8
_WINDOW, _SIGMA = 11, 1.5  # of SSIM (Wang et al. 2004)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LEAST = 1e-9  # of a squared error, so that equal videos have a finite PSNR


def compare(a: Tensor, b: Tensor, extra: Sequence[str] = ()) -> dict[str, list[float]]:
    """Return the value for each pair of clips of each of MEASURES and `extra`, by name."""
    found = {"psnr": psnr(a, b), "ssim": ssim(a, b), "temporal_psnr": temporal_psnr(a, b)}
    pairs = list(zip(a, b, strict=True))
    if "vmaf" in extra:
        with ThreadPoolExecutor(VMAF_AT_ONCE) as pool:  # each waits for a program
            found["vmaf"] = list(pool.map(vmaf, *zip(*pairs, strict=True)))
    if "flip" in extra:
        found["flip"] = [flip(x, y) for x, y in pairs]
    return found


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Return the PSNR in dB of each clip."""
    return [_decibel(x.double() - y) for x, y in zip(a, b, strict=True)]


def temporal_psnr(a: Tensor, b: Tensor) -> list[float]:
    """Return the PSNR in dB of the differences between neighbouring frames."""
    return [
        _decibel(x.double().diff(dim=0) - y.double().diff(dim=0)) for x, y in zip(a, b, strict=True)
    ]


def ssim(a: Tensor, b: Tensor) -> list[float]:
    """Return the mean over frames, channels and whole windows of the SSIM with a Gaussian window.

    Wang et al. 2004, Eq. 13; a window of 11, sigma 1.5, frames of at least 11 pixels a side. In
    fp64, which neither autocast nor TF32 touches: in bf16 a flat window's variance is all rounding.
    """
    values = []
    for x, y in zip(a, b, strict=True):
        x, y = (video.permute(0, 3, 1, 2).flatten(0, 1)[:, None].double() for video in (x, y))
        means = _blur(torch.cat([x, y, x * x, y * y, x * y], 1).transpose(0, 1).flatten(0, 1))
        mean_x, mean_y, xx, yy, xy = means.chunk(5)
        var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
        alike = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
        values.append(
            float((alike / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean())
        )
    return values


def check_extra(names: Sequence[str]) -> None:
    """Refuse measures whose program is not here."""
    if "vmaf" in names:
        _ffmpeg()
    if "flip" in names:
        _flip()


def flip(a: Tensor, reference: Tensor) -> float:
    """Return the mean FLIP, a perceptual distance, of a few frames of a clip uint8 [F, H, W, 3].

    0 for equal frames, at most 1; at the default viewing distance (Andersson et al. 2020). Needs
    flip-evaluator.
    """
    frames = len(a)
    chosen = [(2 * i + 1) * frames // (2 * FLIP_FRAMES) for i in range(min(FLIP_FRAMES, frames))]
    x, y = (v[chosen].cpu().float().numpy() / 255 for v in (reference, a))
    options = {"applyMagma": False, "computeMeanError": True}
    found = [_flip()(one, two, "LDR", **options)[1] for one, two in zip(x, y, strict=True)]
    return float(sum(found) / len(found))


def _flip() -> Callable[..., tuple[Any, float, Any]]:
    try:
        evaluate: Callable[..., Any] = import_module("flip_evaluator").evaluate
    except ImportError as error:
        raise Refusal(
            "evaluation.extra",
            "flip",
            "a measure whose program is installed",
            "pip install flip-evaluator, or leave it out",
        ) from error
    return evaluate


def vmaf(a: Tensor, reference: Tensor) -> float:
    """Return the VMAF of one clip uint8 [F, H, W, 3]; needs imageio-ffmpeg, whose ffmpeg has it."""
    _, height, width, _ = a.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "24"]
    with tempfile.TemporaryDirectory() as folder:
        inputs = []
        for name, video in (("a", a), ("b", reference)):
            path = Path(folder, name)
            path.write_bytes(video.cpu().contiguous().numpy().tobytes())
            inputs += [*raw, "-i", str(path)]
        log = Path(folder, "log.json")
        to_yuv = "[0:v]format=yuv420p[x];[1:v]format=yuv420p[y];[x][y]"
        graph = f"{to_yuv}libvmaf=log_fmt=json:log_path={log}"
        done = subprocess.run(
            [_ffmpeg(), "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Refusal("evaluation.extra", "vmaf", "an ffmpeg with libvmaf", reason)
        return float(json.loads(log.read_text())["pooled_metrics"]["vmaf"]["mean"])


def _ffmpeg() -> str:
    try:
        return str(import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise Refusal(
            "evaluation.extra",
            "vmaf",
            "a measure whose program is installed",
            "pip install imageio-ffmpeg, or leave it out",
        ) from error


def _decibel(error: Tensor) -> float:
    return float(10 * torch.log10(255**2 / error.square().mean().clamp(min=_LEAST)))


def _blur(x: Tensor) -> Tensor:
    """Return whole windows' weighted means of [N, H, W]."""
    at = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    weight = torch.exp(-(at**2) / (2 * _SIGMA**2))
    weight = weight / weight.sum()
    rows = F.conv2d(x[:, None], weight.view(1, 1, -1, 1))
    return F.conv2d(rows, weight.view(1, 1, 1, -1))
