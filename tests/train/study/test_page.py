"""The page of a study: it opens alone, videos play in a browser, masks and budgets are right."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.train.reporting.maps import COLOURS, budgets_moved, mask_maps, read_masks, write_masks
from gossamer.train.reporting.video import webm
from gossamer.train.study.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FRAMES, HEIGHT, WIDTH = 8, 32, 64
COUNT_PLAYING = """<script>(async () => {
  const videos = [...document.querySelectorAll("video")];
  for (const video of videos)
    for (let i = 0; i < 80 && !(video.currentTime > 0); i++)
      await new Promise(done => setTimeout(done, 50));
  const plays = video => video.videoWidth == 64 && video.currentTime > 0 && !video.error;
  document.body.dataset.playing = videos.filter(plays).length;
})()</script>"""


class Tags(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def moving(shift: int) -> np.ndarray:
    """A shaded stripe that runs to the right."""
    row = np.linspace(0, 255, WIDTH).astype(np.uint8)
    frames = [np.roll(row, shift * i)[None, :, None].repeat(HEIGHT, 0) for i in range(FRAMES)]
    return np.stack(frames).repeat(3, 3)


def masks(chance: np.random.Generator, share: float) -> dict[str, torch.Tensor]:
    layers = ("blocks.0.attn1", "blocks.1.attn1")
    return {name: torch.from_numpy(chance.random((2, 10, 12)) < share) for name in layers}


@pytest.fixture
def page(tmp_path: Path, line: Any) -> Path:
    """A page of two arms at one sparsity and of the control, whose runs left videos and masks."""
    chance, lines, runs = np.random.default_rng(0), [], tmp_path / "runs"
    for arm, sparsity, error in (("C", 0.9, 0.2), ("F", 0.9, 0.1), ("J", 0.0, 0.05)):
        for seed in (0, 1):
            found = line(arm, sparsity, seed, error=error)
            found["layers"] = ["blocks.0.attn1", "blocks.1.attn1"]
            if sparsity:
                found["density"] = {"before": [[0.1] * 2] * 2, "after": [[0.1] * 2, [0.16, 0.04]]}
            lines.append(found)
            if seed == 0:
                folder = runs / found["job"] / "evaluation"
                (folder / "samples").mkdir(parents=True)
                videos = {name: moving(i) for i, name in enumerate(("real", "teacher", "after"))}
                np.savez_compressed(folder / "samples" / "clip-0.npz", **videos)
                if sparsity:
                    both = {when: masks(chance, 0.3) for when in ("before", "after")}
                    write_masks(folder / "masks.npz", both)
    return write_page(lines, runs, tmp_path / "study.html")


def test_the_page_opens_alone_and_names_what_it_shows(page: Path) -> None:
    text = page.read_text()
    tags = Tags(text)
    sources = [a[key] for _, a in tags.found for key in ("src", "srcset", "href") if key in a]
    assert sources and all(str(source).startswith("data:") for source in sources)
    videos = tags.all("video")
    named = [video["aria-label"] for video in videos]
    assert named[:2] == ["real clip", "dense teacher"] and len(named) == 5
    assert [name[:2] for name in named[2:] if name] == ["C:", "F:", "J:"]
    for video in videos:
        assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()
        assert str(video["src"]).startswith("data:video/webm;base64,")
    assert len(tags.all("details")) == 5, "expectations, masks and budgets of C and F"
    for expected in ("29.0 dB to the teacher", "15.00 % of the budget moved", "did not hold"):
        assert expected in text, expected


def test_an_encoded_video_gives_its_frames_back() -> None:
    import av

    frames = moving(3)
    with av.open(io.BytesIO(webm(frames))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == FRAMES
    assert np.abs(np.stack(decoded).astype(float) - frames).mean() < 8


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_every_video_plays_in_a_browser(page: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", COUNT_PLAYING + "</body>"))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", "--autoplay-policy=no-user-gesture-required",
        "--virtual-time-budget=60000", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body is not None, done.stderr
    assert body[0] == '<body data-playing="5">'


def test_masks_come_back_bit_for_bit_and_only_where_their_sizes_agree(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    both = {when: masks(chance, 0.4) for when in ("before", "after")}
    write_masks(tmp_path / "masks.npz", both)
    found = read_masks(tmp_path / "masks.npz")
    for when, layers in both.items():
        assert np.array_equal(found[when], torch.stack(list(layers.values())).numpy())
    both["after"]["blocks.1.attn1"] = torch.zeros(2, 3, 3, dtype=torch.bool)
    write_masks(tmp_path / "odd.npz", both)
    assert read_masks(tmp_path / "odd.npz") == {}


def test_a_mask_map_colours_what_training_kept_dropped_and_added(tmp_path: Path) -> None:
    from PIL import Image

    before, after = np.zeros((2, 1, 1, 2, 2), dtype=bool)
    before[0, 0, 0], after[0, 0, :, 0] = True, True  # row 0 before, column 0 after
    parts = mask_maps({"before": before, "after": after}, ["layer 0"], tmp_path / "m.png")
    picture = np.asarray(Image.open(tmp_path / "m.png"))
    scale = 80  # 2 blocks in 160 pixels
    seen = [tuple(picture[scale * r + 5, scale * c + 5]) for r in range(2) for c in range(2)]
    assert seen[:3] == [COLOURS["kept"], COLOURS["dropped"], COLOURS["added"]]
    assert "50.0 % of all blocks stayed" in parts[1]


def test_the_text_says_which_heads_gained_and_lost_most(tmp_path: Path) -> None:
    density = {"before": [[0.1, 0.1], [0.1, 0.1]], "after": [[0.1, 0.13], [0.05, 0.12]]}
    picture, text = budgets_moved(density, ["layer 0", "layer 1"], tmp_path / "b.png")
    assert "12.50 % of the budget moved" in text
    assert "gained: layer 0 head 1, +3.00 points" in text
    assert "lost: layer 1 head 0, -5.00 points" in text
    encoded = re.search(r"base64,([^\"]*)", picture)
    assert encoded is not None and base64.b64decode(encoded[1])[:4] == b"\x89PNG"
