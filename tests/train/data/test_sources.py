"""One video, a folder, or a list; captions from lists and from files beside the videos."""

import hashlib
import json
from pathlib import Path

import pytest

from gossamer.train.data.sources import list_sources
from gossamer.train.refusal import Refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.webm", "sub/c.MOV", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.txt").write_text("a red ball\n")
    return tmp_path


def test_a_folder_gives_its_videos_in_order_with_sidecar_captions(folder: Path) -> None:
    found = [(item.name, item.caption) for item in list_sources(folder)]
    assert found == [("a.webm", ""), ("b.mp4", "a red ball"), ("sub/c.MOV", "")]


def test_captions_jsonl_of_a_folder_comes_before_sidecars(folder: Path) -> None:
    (folder / "captions.jsonl").write_text(
        json.dumps({"video": "b.mp4", "caption": "two balls"}) + "\n"
    )
    assert [item.caption for item in list_sources(folder)] == ["", "two balls", ""]


def test_one_video_and_lists_of_videos(folder: Path) -> None:
    (item,) = list_sources(folder / "b.mp4")
    assert (item.name, item.caption) == ("b.mp4", "a red ball")
    assert item.content_hash() == hashlib.sha256(b"b.mp4").hexdigest()
    (folder / "list.txt").write_text("b.mp4\n\nsub/c.MOV\n")
    assert [item.name for item in list_sources(folder / "list.txt")] == ["b.mp4", "sub/c.MOV"]
    lines = [{"video": "sub/c.MOV", "caption": "x"}, {"video": "b.mp4"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [(item.name, item.caption) for item in list_sources(folder / "list.jsonl")]
    assert found == [("sub/c.MOV", "x"), ("b.mp4", "a red ball")]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"caption": "x"}', '{"video": 3}', '{"video": "a", "caption": 4}']
)
def test_a_wrong_line_is_refused_by_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text('{"video": "b.mp4"}\n' + line)
    with pytest.raises(Refusal, match=r"list\.jsonl line 2"):
        list_sources(tmp_path / "list.jsonl")


def test_a_caption_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refusal, match=r"b\.txt.*UTF-8"):
        list_sources(folder)


def test_no_source_no_video_or_a_repeated_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="check the path"):
        list_sources(tmp_path / "missing")
    with pytest.raises(Refusal, match="at least one video"):
        list_sources(tmp_path)
    (tmp_path / "list.txt").write_text("a.mp4\na.mp4\n")
    with pytest.raises(Refusal, match="1 repeated"):
        list_sources(tmp_path / "list.txt")
