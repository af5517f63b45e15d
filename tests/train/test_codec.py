"""The PCA codec against convolution and SVD; the VAE codec against diffusers' own calls."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from gossamer.train.codec import DiffusersVAECodec, PCACodec, load_codec
from gossamer.train.refusal import Refusal


def smooth_videos(count: int = 4, frames: int = 4, height: int = 16, width: int = 24) -> list:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 2, 4, 6, generator=generator) * 2 - 1
    fine = torch.rand(count, 3, frames, height, width, generator=generator) * 0.1
    video = functional.interpolate(coarse, size=(frames, height, width), mode="trilinear") + fine
    return list(video.clamp(-1, 1))


def patch_matrix(videos: list, t: int, p: int, q: int) -> torch.Tensor:
    """Every patch as a row of fp64, by plain loops."""
    rows = []
    for video in videos:
        _, frames, height, width = video.shape
        for f in range(0, frames, t):
            for y in range(0, height, p):
                for x in range(0, width, q):
                    rows.append(video[:, f : f + t, y : y + p, x : x + q].flatten())
    return torch.stack(rows).double()


def test_encode_equals_a_strided_convolution_with_the_saved_basis(tmp_path: Path) -> None:
    videos = smooth_videos()
    codec = PCACodec.fit(videos, channels=10)
    codec.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    basis = load_file(tmp_path / "pca.safetensors")["basis"].double()
    projected = functional.conv3d(
        torch.stack(videos).double(), basis.view(10, 3, 2, 4, 4), stride=(2, 4, 4)
    )
    mean, std = (
        torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    expected = (projected - mean) / std
    torch.testing.assert_close(
        codec.encode(torch.stack(videos)).double(), expected, atol=1e-5, rtol=1e-5
    )


def test_reconstruction_error_equals_the_dropped_singular_values() -> None:
    videos = smooth_videos()
    codec = PCACodec.fit(videos, channels=10)
    batch = torch.stack(videos)
    error = (codec.decode(codec.encode(batch)) - batch).double().square().sum()
    rows = patch_matrix(videos, 2, 4, 4)
    dropped = torch.linalg.svdvals(rows - rows.mean(0))[10:].square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=0)


def test_all_channels_are_lossless() -> None:
    videos = smooth_videos()
    codec = PCACodec.fit(videos, channels=96)
    batch = torch.stack(videos)
    torch.testing.assert_close(codec.decode(codec.encode(batch)), batch, atol=2e-5, rtol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_latents_have_rms_one_and_channel_spread_of_the_power(power: float) -> None:
    videos = smooth_videos()
    latents = PCACodec.fit(videos, channels=10, power=power).encode(torch.stack(videos)).double()
    rows = patch_matrix(videos, 2, 4, 4)
    std = torch.linalg.svdvals(rows - rows.mean(0))[:10] / len(rows) ** 0.5
    expected = std.pow(1 - power)
    measured = latents.std((0, 2, 3, 4), correction=0)
    assert latents.square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(measured / measured[0], expected / expected[0], rtol=1e-3, atol=1e-4)


def test_a_saved_codec_loads_bit_equal_and_refitting_gives_the_same_fingerprint(
    tmp_path: Path,
) -> None:
    videos = smooth_videos()
    codec = PCACodec.fit(videos, channels=10)
    codec.save(tmp_path)
    loaded = load_codec(tmp_path)
    batch = torch.stack(videos)
    assert torch.equal(loaded.encode(batch), codec.encode(batch))
    assert loaded.fingerprint == codec.fingerprint == PCACodec.fit(videos, channels=10).fingerprint
    assert PCACodec.fit(videos[:2], channels=10).fingerprint != codec.fingerprint


@pytest.mark.parametrize(
    ("field", "shape"), [("frames", (5, 16, 24)), ("height", (4, 15, 24)), ("width", (4, 16, 26))]
)
def test_a_size_the_patch_does_not_divide_is_refused_with_a_fix(field: str, shape: tuple) -> None:
    codec = PCACodec.fit(smooth_videos(), channels=10)
    with pytest.raises(Refusal, match=f"{field}=.*use e.g. {field}=") as error:
        codec.encode(torch.zeros(1, 3, *shape))
    assert error.value.field == field


def test_an_unfitted_codec_refuses_to_encode() -> None:
    with pytest.raises(Refusal, match="not fitted"):
        PCACodec().encode(torch.zeros(1, 3, 2, 4, 4))


@pytest.mark.parametrize(
    "wrong", [{"channels": 97}, {"channels": 0}, {"patch": (2, 4)}, {"power": 2.0}]
)
def test_a_specification_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(Refusal, match="allowed is"):
        PCACodec(**wrong)


def test_a_missing_or_damaged_codec_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"config\.json"):
        PCACodec(path=tmp_path)
    PCACodec.fit(smooth_videos(), channels=10).save(tmp_path)
    tensors = load_file(tmp_path / "pca.safetensors")
    tensors["basis"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "pca.safetensors")
    with pytest.raises(Refusal, match="finite"):
        load_codec(tmp_path)
    (tmp_path / "pca.safetensors").write_bytes(b"short")
    with pytest.raises(Refusal, match="fit again"):
        load_codec(tmp_path)


def test_constant_videos_do_not_make_infinite_latents() -> None:
    video = torch.full((3, 4, 8, 8), 0.25)
    codec = PCACodec.fit([video], channels=4)
    assert codec.encode(video[None]).isfinite().all()
    torch.testing.assert_close(codec.decode(codec.encode(video[None])), video[None])


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    folder = tmp_path_factory.mktemp("pipeline")
    vae.save_pretrained(str(folder / "vae"))
    return folder


def test_vae_codec_normalises_the_posterior_mode_of_diffusers(vae_folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(str(vae_folder / "vae"), local_files_only=True)
    codec = DiffusersVAECodec(path=vae_folder)
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    latents = codec.encode(video)
    with torch.no_grad():
        raw = vae.encode(video).latent_dist.mean
        restored = vae.decode(raw).sample
    for channel in range(16):
        expected = (raw[:, channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[
            channel
        ]
        torch.testing.assert_close(latents[:, channel], expected)
    assert latents.shape[1:] == codec.latent_shape(9, 32, 32) == (16, 3, 4, 4)
    assert torch.equal(latents, codec.encode(video))
    torch.testing.assert_close(codec.decode(latents), restored, atol=1e-5, rtol=1e-5)
    fp32 = codec.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):  # of an evaluation
        assert torch.equal(codec.encode(video), latents)
        assert torch.equal(codec.decode(latents), fp32)


def test_vae_codec_takes_4k_plus_1_frames_and_reloads_from_what_it_saved(
    vae_folder: Path, tmp_path: Path
) -> None:
    codec = DiffusersVAECodec(path=vae_folder / "vae")
    assert [n for n in range(1, 12) if codec.valid_frames(n)] == [1, 5, 9]
    with pytest.raises(Refusal, match=r"4k \+ 1"):
        codec.encode(torch.zeros(1, 3, 8, 32, 32))
    codec.save(tmp_path)
    assert load_codec(tmp_path).fingerprint == codec.fingerprint


def test_vae_codec_refuses_a_folder_without_a_vae(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"codec\.path"):
        DiffusersVAECodec(path=tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "os.system"}')
    with pytest.raises(Refusal, match="PCACodec or AutoencoderKLWan"):
        load_codec(tmp_path)
