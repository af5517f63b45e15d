"""Which blocks each head computes, before and after training, and where the budgets moved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, stack

from gossamer.train.reporting import page, theme
from gossamer.train.reporting.page import Html

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Masks = NDArray[np.bool_]  # [L, H, Nq, Nk]

COLOURS = {"kept": (214, 220, 226), "dropped": (224, 122, 40), "added": (56, 140, 214)}
NEITHER, GAP = (24, 27, 31), 4
LARGEST, SHOWN_LAYERS, SHOWN_HEADS = 160, 3, 8  # pixels of a map; maps of a picture


def write_masks(path: Path, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write bits of masks by time and layer, each bool [H, Nq, Nk]; nothing where sizes differ."""
    shapes = {mask.shape for layers in masks.values() for mask in layers.values()}
    if len(shapes) != 1:
        return
    found = {when: stack(list(layers.values())).numpy() for when, layers in masks.items()}
    arrays = {when: np.packbits(mask) for when, mask in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = next(iter(found.values())).shape
    np.savez_compressed(path, allow_pickle=False, shape=np.array(shape), **arrays)


def read_masks(path: Path) -> dict[str, Masks]:
    """Read what write_masks wrote: time -> bool [L, H, Nq, Nk]; empty where there is nothing."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as archive:
        shape = tuple(archive["shape"])
        count = int(np.prod(shape))
        return {
            when: np.unpackbits(archive[when], count=count).astype(bool).reshape(shape)
            for when in archive
            if when != "shape"
        }


def mask_maps(masks: Mapping[str, Masks], layers: Sequence[str], path: Path) -> list[Html]:
    """Return a picture of some layers' heads: which blocks training kept, dropped and added."""
    from PIL import Image

    before, after = masks["before"], masks["after"]
    chosen = sorted({0, len(before) // 2, len(before) - 1})[:SHOWN_LAYERS]
    heads = min(SHOWN_HEADS, before.shape[1])
    step = -(-max(before.shape[2:]) // LARGEST)
    scale = max(1, LARGEST // max(before.shape[2:]))
    rows = []
    for layer in chosen:
        tiles = [_coloured(before[layer, h], after[layer, h])[::step, ::step] for h in range(heads)]
        tiles = [tile.repeat(scale, 0).repeat(scale, 1) for tile in tiles]
        rows.append(np.concatenate([_framed(tile) for tile in tiles], 1))
    Image.fromarray(np.concatenate(rows, 0)).save(path, optimize=True)
    same = float((before & after).sum() / max(1, before.sum()))
    named = ", ".join(layers[i] for i in chosen)
    text = (
        f"Rows: {named}; columns: heads. Across: key blocks, down: query blocks, of one held-out "
        "clip at the middle noise level. Light: computed exactly before and after training; "
        f"orange: no more; blue: new. {100 * same:.1f} % of all blocks stayed."
    )
    return [page.image(path, f"Masks of {named}, before and after"), page.paragraph(text, "soft")]


def budgets_moved(
    density: Mapping[str, Sequence[Sequence[float]]], layers: Sequence[str], path: Path
) -> list[Html]:
    """Return maps of each head's density before and its change, and say how much moved."""
    before, after = (np.asarray(density[when], dtype=np.float64) for when in ("before", "after"))
    change = after - before
    theme.write(path, lambda colours: _change(colours, before, change, layers))
    gained, lost = (
        divmod(int(place), change.shape[1]) for place in (change.argmax(), change.argmin())
    )
    text = (
        f"{100 * np.abs(change).sum() / 2 / before.sum():.2f} % of the budget moved between heads. "
        f"Most gained: {layers[gained[0]]} head {gained[1]}, {100 * change[gained]:+.2f} points; "
        f"most lost: {layers[lost[0]]} head {lost[1]}, {100 * change[lost]:+.2f} points."
    )
    return [page.plot(path, "density of each head and its change"), page.paragraph(text, "soft")]


def _coloured(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> NDArray[np.uint8]:
    picture = np.full((*before.shape, 3), NEITHER, np.uint8)
    picture[before & after] = COLOURS["kept"]
    picture[before & ~after] = COLOURS["dropped"]
    picture[~before & after] = COLOURS["added"]
    return picture


def _framed(tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=128)


def _change(
    colours: theme.Theme,
    before: NDArray[np.float64],
    change: NDArray[np.float64],
    layers: Sequence[str],
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, min(1.5 + 0.3 * len(before), 7.0)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    most = max(float(np.abs(change).max()), 1e-6)
    shown = left.imshow(before, cmap="viridis", aspect="auto")
    figure.colorbar(shown, ax=left, label="density")
    moved = right.imshow(change, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    figure.colorbar(moved, ax=right, label="change of density")
    left.set(title="Before training", xlabel="head")
    right.set(title="Change by training", xlabel="head")
    left.set_yticks(range(len(layers)), list(layers))
    return figure
