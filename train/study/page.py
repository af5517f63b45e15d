"""The study as one HTML page: arms side by side as playing video, their masks and budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.train.files import write_atomic
from gossamer.train.reporting import page
from gossamer.train.reporting.maps import budgets_moved, mask_maps, read_masks
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.sections import short_names
from gossamer.train.reporting.video import playing, side_by_side, webm
from gossamer.train.study.data import Study
from gossamer.train.study.expectations import summary, verdicts
from gossamer.train.study.numbers import named
from gossamer.train.study.statistics import bootstrap, mean

MASKS = "evaluation/masks.npz"


def write_page(
    lines: Sequence[Mapping[str, Any]],
    runs: Path,
    path: Path,
    *,
    arms: Sequence[str] = (),
    clips: int = 2,
) -> Path:
    """Write the page; `runs` is the sweep's folder, `arms` those to show (all if empty).

    Pictures are written beside the page and inlined: it opens alone. An arm whose run is not
    there, or kept no video, is left out of that part.
    """
    study = Study.of(lines)
    shown = [line for line in lines if not arms or line["overrides"]["arm"] in arms]
    shown.sort(key=lambda line: study.arms.index(line["overrides"]["arm"]))
    pictures = path.parent / f"{path.stem}-pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [_expected(study)]
    for sparsity in study.sparsities:
        own = _of_sparsity(shown, sparsity)
        name = f"{100 * sparsity:g} %"
        parts.append(
            page.section(
                f"At {name} sparsity",
                _table(study, sparsity, own),
                *_videos(own, runs, clips),
                *_masks(own, runs, pictures),
                *_budgets(own, pictures),
            )
        )
    title = "The arms of the study side by side"
    subtitle = "Everything is measured on held-out clips; videos are sampled from the same noise."
    write_atomic(path, page.document(title, subtitle, parts))
    return path


def _of_sparsity(lines: Sequence[Mapping[str, Any]], sparsity: float) -> list[Mapping[str, Any]]:
    """Return one line an arm, of its first seed; dense arms belong to every sparsity."""
    first: dict[str, Mapping[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["settings"]["seed"]):
        if line["settings"]["sparsity"] in (sparsity, 0.0):
            first.setdefault(line["overrides"]["arm"], line)
    order = list(dict.fromkeys(line["overrides"]["arm"] for line in lines))
    return [first[arm] for arm in order if arm in first]


def _expected(study: Study) -> Html:
    found = verdicts(study)
    each = [page.paragraph(f"{v.status}: {v.expected}. {v.found}") for v in found]
    lead = page.paragraph(summary(found), "lead")
    return page.section("What we expected", lead, page.details("Each of them", *each))


def _table(study: Study, sparsity: float, lines: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for line in lines:
        cell = study.get(line["overrides"]["arm"], sparsity)
        if cell is None or cell.after is None:
            continue
        psnr = cell.quality("teacher/after", "psnr")
        rows.append(
            (
                named(cell.arm),
                bootstrap([cell.after.mean(-1)], cell.shots, mean, draws=500).text(),
                "" if psnr is None else f"{psnr.mean():.2f}",
                "" if cell.density is None else f"{100 * (1 - cell.density):.2f} %",
            )
        )
    head = ("arm", "velocity error", "PSNR to the teacher, dB", "measured sparsity")
    return page.table(head, rows, "Means over clips, noise levels and seeds; 95 % intervals.")


def _videos(lines: Sequence[Mapping[str, Any]], runs: Path, clips: int) -> list[Html]:
    parts = []
    for number in range(clips):
        figures: dict[str, Html] = {}
        for line in lines:
            file = runs / line["job"] / "evaluation" / "samples" / f"clip-{number}.npz"
            if not file.is_file():
                continue
            with np.load(file, allow_pickle=False) as archive:
                for name, title in (("real", "real clip"), ("teacher", "dense teacher")):
                    if name in archive and title not in figures:
                        figures[title] = playing(webm(archive[name]), title)
                if "after" in archive:
                    arm = line["overrides"]["arm"]
                    psnr = line["quality"].get("teacher/after", {}).get("psnr", [])
                    text = f"{psnr[number]:.1f} dB to the teacher" if number < len(psnr) else ""
                    figures[arm] = playing(webm(archive["after"]), named(arm), text)
        if figures:
            order = ["real clip", "dense teacher", *figures]
            chosen = [figures[title] for title in dict.fromkeys(order) if title in figures]
            parts += [page.heading(f"Held-out clip {number + 1}"), side_by_side(*chosen)]
    return parts


def _masks(lines: Sequence[Mapping[str, Any]], runs: Path, pictures: Path) -> list[Html]:
    parts = []
    for line in lines:
        masks = read_masks(runs / line["job"] / MASKS) if line["trained"] else {}
        if masks:
            path = pictures / f"{_file(line)}-masks.png"
            maps = mask_maps(masks, short_names(line["layers"]), path)
            parts.append(page.details(f"Masks of {named(line['overrides']['arm'])}", *maps))
    return [page.heading("Masks before and after training"), *parts] if parts else []


def _budgets(lines: Sequence[Mapping[str, Any]], pictures: Path) -> list[Html]:
    parts = []
    for line in lines:
        if line["trained"] and "density" in line:
            path = pictures / f"{_file(line)}-budgets.png"
            moved = budgets_moved(line["density"], short_names(line["layers"]), path)
            parts.append(page.details(f"Budgets of {named(line['overrides']['arm'])}", *moved))
    return [page.heading("Where the budgets moved"), *parts] if parts else []


def _file(line: Mapping[str, Any]) -> str:
    return f"{line['overrides']['arm']}-{line['settings']['sparsity']:g}"
