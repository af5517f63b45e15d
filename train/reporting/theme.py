"""The colours of a report's plots, and saving a plot for light and for dark screens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.train.reporting.page import IMAGE_DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """The colours of a plot; before and after are told apart by colour-blind readers too."""

    paper: str
    ink: str
    grid: str
    before: str
    after: str
    lines: tuple[str, ...]

    @property
    def settings(self) -> dict[Any, Any]:
        """Return matplotlib's settings for this theme."""
        inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        papered = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
        return {
            **dict.fromkeys(inked, self.ink),
            **dict.fromkeys(papered, self.paper),
            "grid.color": self.grid,
            "legend.edgecolor": self.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "font.size": 10,
        }


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2024",
    grid="#d9dee4",
    before="#c8500a",
    after="#0067a5",
    lines=("#0067a5", "#c8500a", "#0a8f68", "#a5488c", "#9a7d0a"),
)
DARK = Theme(
    paper="#14171a",
    ink="#e6e9ec",
    grid="#333a42",
    before="#f0a35e",
    after="#6db9ef",
    lines=("#6db9ef", "#f0a35e", "#4fd0a5", "#e39acb", "#e0c95a"),
)


def write(path: Path, draw: Callable[[Theme], Figure]) -> Path:
    """Save the figure at path in light colours and beside it as `-dark`; return path."""
    import matplotlib

    dark = path.with_stem(path.stem + "-dark")
    for theme, target in ((LIGHT, path), (DARK, dark)):
        with matplotlib.rc_context(theme.settings):
            draw(theme).savefig(target, dpi=IMAGE_DPI)
    return path
