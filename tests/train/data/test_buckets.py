"""Clips of several sizes: cut to the nearest bucket, trained one size a batch."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gossamer.sparse.attach import attach, method_from_spec
from gossamer.train.codec import PCACodec
from gossamer.train.config import compose
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.data.encode import encode
from gossamer.train.data.settings import EncodeSettings
from gossamer.train.data.shards import Manifest
from gossamer.train.model import ScratchWan, velocity
from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords

BUCKETS = [[8, 32, 64], [8, 64, 32], [4, 32, 64]]


@pytest.fixture
def films(make_video: Callable, tmp_path: Path) -> Path:
    """Two wide films, one tall one; the wide ones have shots that only the short bucket takes."""
    folder = tmp_path / "films"
    make_video(folder / "a.mp4", (12, 5, 12, 6), height=36, width=64)
    make_video(folder / "b.mp4", (12, 5), height=72, width=128, first_level=1)
    make_video(folder / "c.mp4", (12, 6, 10), height=64, width=40, first_level=2)
    make_video(folder / "d.mp4", (12, 5), height=36, width=64, first_level=3)
    make_video(folder / "e.mp4", (12, 6), height=64, width=36, first_level=4)
    return folder


@pytest.fixture
def encoded(films: Path, tmp_path: Path) -> Path:
    encode(
        films, tmp_path / "data", codec=PCACodec(channels=4), text=HashedWords(dim=16, length=4),
        height=32, width=64, frames=8, buckets=BUCKETS, stride=2, holdout=0.4,
    )  # fmt: skip
    return tmp_path / "data"


def test_a_video_takes_the_nearest_aspect_and_a_shot_the_longest_that_fits(encoded: Path) -> None:
    data = LatentDataset(encoded, "train")
    found = Counter()
    for index in range(len(data)):
        meta, item = data.meta(index), data[index]
        size = (meta["frames"], meta["height"], meta["width"])
        assert item["latent"].shape == (4, size[0] // 2, size[1] // 4, size[2] // 4)
        assert tuple(item["latent"].shape) == data.shape(index)
        length = meta["shot_end"] - meta["shot_start"]
        assert size[1:] == ((64, 32) if meta["source"] == "c.mp4" else (32, 64))
        assert size[0] == (8 if length >= 8 or size[1] == 64 else 4)
        found[size] += 1
    assert set(found) == {tuple(bucket) for bucket in BUCKETS}
    skipped = [json.loads(line) for line in (encoded / "skipped.jsonl").open()]
    short = {(s["video"], s["reason"]) for s in skipped if "static" not in s["reason"]}
    assert short == {
        ("c.mp4", "shorter than 8 frames"),
        ("e.mp4", "shorter than 8 frames"),
    }


def test_a_shard_holds_one_size(encoded: Path) -> None:
    manifest = Manifest.load(encoded)
    assert manifest is not None
    shapes = [tuple(s.latent_shape) for s in manifest.shards if s.split == "train"]
    assert sorted(shapes) == [(4, 2, 8, 16), (4, 4, 8, 16), (4, 4, 16, 8)]


def test_of_equal_aspects_the_nearest_area_is_taken() -> None:
    settings = EncodeSettings(
        height=1, width=1, frames=1, buckets=((8, 32, 64), (4, 64, 128), (16, 64, 64))
    )
    assert settings.place(36, 72) == (32, 64)
    assert settings.place(720, 1440) == (64, 128)
    assert settings.place(100, 90) == (64, 64)


@pytest.mark.parametrize(
    ("value", "said"),
    [("[[8,32]]", "frames, height, width"), ("[]", "null or a list"), ("[[8,32,0]]", "null or"),
     ("[[8,32,64],[8,32,64]]", "null or"), ("7", "null or"), ("[[8,32,1.5]]", "null or")],
)  # fmt: skip
def test_wrong_buckets_are_refused(value: str, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        compose([f"data.buckets={value}"])


@pytest.fixture
def student(lab: Any, encoded: Path, films: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def overrides(name: str, **settings: object) -> list[str]:
        data = {
            "data.source": films,
            "data.dir": encoded,
            "data.buckets": json.dumps(BUCKETS).replace(" ", ""),
            "data.stride": 2,
            "data.holdout": 0.4,
        }
        merged = {**lab.student_settings, "steps": 6, "name": name, **data, **settings}
        return lab.overrides(tmp_path / "runs", merged)

    return overrides


def test_a_run_with_buckets_is_the_same_from_url_with_ranks_and_after_a_stop(
    student: Callable, lab: Any, launcher: Any, encoded: Path, tmp_path: Path
) -> None:
    """One process from the folder; two from a URL, with workers, resumed from half-way."""
    stages = {"stages": "[encode,calibrate,train,evaluate]"}
    whole = launcher.run(student("whole", **stages))
    assert whole.code == 0, whole.text
    evaluation = json.loads((tmp_path / "runs/whole/evaluation/evaluation.json").read_text())
    errors = torch.tensor(evaluation["velocity_error"]["before"])
    assert errors.shape == (2, 2) and errors.isfinite().all() and (errors > 0).all()
    for bucket_density in evaluation["density"]["after"]:
        assert all(0.2 < density < 0.6 for density in bucket_density)
    url = {
        "data": "encoded", "data.dir": f"file://{encoded}", "data.cache": tmp_path / "cache",
        "num_workers": 1, "calibration.path": tmp_path / "runs/whole/calibration",
        "checkpoint_every": 3, "stages": "[train]",
    }  # fmt: skip
    keys = ("data.", "codec.patch", "calibration.", "stages", "num_workers", "checkpoint_every")
    mine = [line for line in student("streamed") if not line.startswith(keys)]
    mine += ["codec.patch=[2,4,4]", *(f"{key}={value}" for key, value in url.items())]
    # the calibration and the schedule are the whole run's; the run ends at step 3 by its steps
    fault = launcher.ranks(mine, fault=(1, "after-rename"))
    assert fault[0].code == -9
    for done in launcher.ranks(mine):
        assert done.code == 0, done.text
    for (step, *row), (other, *expected) in zip(
        lab.run(tmp_path / "runs", "streamed").losses,
        lab.run(tmp_path / "runs", "whole").losses,
        strict=True,
    ):
        assert step == other and row == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
def test_buckets_compile_once_each_and_then_never_again() -> None:
    """Every function is compiled at most once a bucket, and never after the first round."""
    import torch._dynamo.utils as dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    dynamo.clear_compilation_metrics()
    model = ScratchWan(
        num_layers=2, num_heads=2, head_dim=16, ffn_dim=32, channels=4, text_dim=8
    ).load(0)
    cfg = compose(["backend=reference"])
    names = ["layout", "estimator", "policy", "compensation", "backend"]
    attach(model, method_from_spec(OmegaConf.to_container(OmegaConf.masked_copy(cfg, names))))
    counter, counts = CompileCounter(), []
    for block in model.blocks:
        block.compile(backend=counter)
    shapes = [(4, 8, 16), (4, 16, 8), (2, 8, 8)]
    for _ in range(3):
        for shape in shapes:
            out = velocity(
                model, torch.randn(1, 4, *shape), torch.rand(1), torch.randn(1, 2, 8), None
            )
            out.square().mean().backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and [b - a for a, b in pairwise(counts)] == [0, 0]
    compiled = Counter(
        (m.co_filename, m.co_firstlineno, m.co_name) for m in dynamo.get_compilation_metrics()
    )
    assert max(compiled.values()) <= len(shapes), compiled.most_common(3)
    torch._dynamo.reset()
