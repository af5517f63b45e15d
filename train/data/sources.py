"""Which videos to encode, with their captions."""

import json
from dataclasses import dataclass
from pathlib import Path

from gossamer.train.files import sha256
from gossamer.train.refusal import Refusal

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif"}
)
CAPTION_LIST = "captions.jsonl"


@dataclass(frozen=True)
class SourceItem:
    """One video file; `name` is its path relative to the source, so that data can move."""

    path: Path
    name: str
    caption: str = ""

    def content_hash(self) -> str:
        """SHA-256 of the file, or "missing"."""
        try:
            return sha256(self.path)
        except OSError:
            return "missing"


def list_sources(source: str | Path) -> list[SourceItem]:
    """A video file, a folder of videos, or a .txt / .jsonl list -> items, in a fixed order.

    Captions: `{"video": ..., "caption": ...}` lines of a .jsonl list or of captions.jsonl in the
    folder, else a .txt file beside the video, else "". Paths in lists are relative to the list.
    """
    path = Path(source)
    if path.is_dir():
        items = _folder(path)
    elif not path.is_file():
        raise Refusal("source", source, "a video, a folder or a .txt/.jsonl list", "check the path")
    elif path.suffix == ".jsonl":
        items = _json_lines(path)
    elif path.suffix == ".txt":
        names = [line.strip() for line in _read(path).splitlines()]
        items = [_item(path.parent, name) for name in names if name]
    else:
        items = [_item(path.parent, path.name)]
    if not items:
        raise Refusal(
            "source", source, "at least one video", "give a folder or list that names videos"
        )
    repeated = len(items) - len({item.name for item in items})
    if repeated:
        raise Refusal("source", source, "each video once", f"remove {repeated} repeated entries")
    return items


def _folder(folder: Path) -> list[SourceItem]:
    captions = {}
    if (folder / CAPTION_LIST).is_file():
        captions = {item.name: item.caption for item in _json_lines(folder / CAPTION_LIST)}
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
    )
    return [_item(folder, name, captions.get(name)) for name in names]


def _json_lines(path: Path) -> list[SourceItem]:
    items = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["video"], entry.get("caption")
            if not isinstance(name, str) or not isinstance(caption, str | None):
                raise TypeError("video and caption are strings")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(
                f"{path.name} line {number}",
                line[:60],
                '{"video": path, "caption": text}',
                f"mend it: {error}",
            ) from error
        items.append(_item(path.parent, name, caption))
    return items


def _item(folder: Path, name: str, caption: str | None = None) -> SourceItem:
    path = folder / name
    if caption is None:
        sidecar = path.with_suffix(".txt")
        caption = _read(sidecar).strip() if sidecar.is_file() else ""
    return SourceItem(path, name, caption)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            str(path), "unreadable", "UTF-8 text", f"save it as UTF-8: {error}"
        ) from error
