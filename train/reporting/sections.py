"""The sections of a report about training, masks, calibration, videos and config.

A section whose input the run does not have says so in one sentence.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.train.calibration import SQUARED
from gossamer.train.reporting import maps, page, plots, strips, theme
from gossamer.train.reporting.calibration import ERRORS
from gossamer.train.reporting.errors import percent
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.run import Array, Run

LOSS = {"loss": "Training loss (mean squared velocity error)"}
TRAINING = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "density": "Density of the masks in training",
    "step_seconds": "Seconds a step",
}


def training(run: Run) -> Html:
    """Return the loss and the other metrics of training."""
    if not run.curves:
        return _absent("Training", "metrics.jsonl is not in this run, so there is no loss plot.")
    present = {
        field: title
        for field, title in TRAINING.items()
        if any(np.isfinite(rows[field]).any() for rows in run.curves.values())
        and not (run.is_dense and field == "density")
    }
    parts = [_curves_plot(run, "loss.png", LOSS)]
    if present:
        parts.append(page.details("More curves", _curves_plot(run, "training.png", present)))
    own = next(iter(run.curves.values()))
    text = f"{len(own['step'])} steps logged"
    if np.isfinite(own["step_seconds"]).any():
        text += f", {np.nanmedian(own['step_seconds']):.3g} s a step (median)"
    if np.isfinite(own["data_seconds"]).any():
        text += f", of which {np.nanmedian(own['data_seconds']):.2g} s waiting for data"
    faint = "Faint: every logged step; solid: running mean."
    return page.section("Training", *parts, page.paragraph(f"{text}. {faint}", "soft"))


def masks(run: Run) -> Html:
    """Return budgets, densities and captured attention mass of each layer and head."""
    title = "Masks: what each head keeps"
    parts = [*_budget_maps(run), *_measured_maps(run), *_hit_rates(run), *_moved(run)]
    parts += _mass_per_noise_level(run)
    if not parts:
        return _absent(title, "Neither calibration nor mask measurements are in this run.")
    return page.section(title, *parts)


def calibration_curves(run: Run) -> Html:
    """Return the error curves that calibration divided the budget by."""
    title = "Calibration curves"
    found = run.calibration
    if found is None:
        return _absent(title, "calibration/calibration.json is not in this run: no error curves.")
    if not found.get("curve_error"):
        return _absent(title, "This allocation measures no error curves.")
    error = np.asarray(found["curve_error"], dtype=np.float64).mean(2)  # over noise levels
    if found["measure"] in SQUARED:
        error = np.sqrt(error)
    densities = np.asarray(found["curve_densities"], dtype=np.float64)
    path = theme.write(
        run.report / "curves.png",
        lambda colours: plots.calibration_curves(
            colours, densities, error, found["target_density"], unit=ERRORS[found["measure"]]
        ),
    )
    text = (
        f"One line a head: {ERRORS[found['measure']]} when only this head is sparse, the measure "
        f"that its budget follows. Calibrated on {found['clips']} clips in "
        f"{found['seconds']:.0f} s."
    )
    return page.section(title, page.paragraph(text), page.plot(path, title))


def calibration_choices(run: Run) -> Html:
    """Return what calibration printed: every head's mass and error, choices and reasons."""
    title = "What calibration chose, and why"
    if run.calibration_said is None:
        return _absent(title, "calibration/calibration.txt is not in this run.")
    said = page.preformatted(run.calibration_said)
    return page.section(title, page.details("Show each head and every choice", said))


def videos(run: Run) -> Html:
    """Return each sampled clip as a strip of frames and as a moving picture."""
    title = "Videos"
    samples = run.evaluation.get("samples") or {}
    paths = [run.folder / "evaluation" / file for file in samples.get("files", [])]
    found = [(n, path) for n, path in enumerate(paths) if path.is_file()]
    if not found:
        return _absent(title, "No sampled videos are in this run.")
    parts = [part for n, path in found for part in _video(run, n, path, samples)]
    if len(found) < len(paths):
        missing = f"{len(paths) - len(found)} of {len(paths)} sample files are missing."
        parts.append(page.paragraph(missing, "soft"))
    return page.section(title, *parts)


def config(run: Run) -> Html:
    """Return the resolved config, folded away."""
    if run.config is None:
        return _absent("Config", "config.yaml is not in this run.")
    return page.section(
        "Config", page.details("Show the resolved config", page.preformatted(run.config))
    )


def _curves_plot(run: Run, name: str, columns: Mapping[str, str]) -> Html:
    path = theme.write(
        run.report / name, lambda colours: plots.training(colours, run.curves, columns)
    )
    return page.plot(path, " and ".join(columns.values()))


def _budget_maps(run: Run) -> list[Html]:
    found = run.calibration
    if found is None:
        return [page.paragraph("calibration/calibration.json is not in this run: no budgets.")]
    k, p = np.asarray(found["k"]), np.asarray(found["p"])
    shown = [
        _head_maps(run, "budgets-k.png", {"Top-k: share of blocks": k}, found["layers"], "share")
    ]
    text = (
        f"Calibration planned a mean density of {found['planned_density']:.4f} for a target of "
        f"{found['target_density']:.4f}. A row of blocks keeps its best share k, "
    )
    if np.any(p > 0):
        panels = {"Top-p: attention mass": p}
        shown.append(_head_maps(run, "budgets-p.png", panels, found["layers"], "mass"))
        text += "and more until it holds the mass p."
    else:
        text += "which is each head's planned density, since every p is 0."
    return [page.heading("Planned budgets"), page.paragraph(text), *shown]


def _measured_maps(run: Run) -> list[Html]:
    """Return density and captured mass, as far as the evaluation holds them."""
    layers = run.evaluation.get("layers") or (run.calibration or {}).get("layers")
    texts = {
        "density": (
            "Measured density",
            "Share of token pairs that each head computes exactly on the held-out clips.",
        ),
        "recall": (
            "Captured attention mass",
            "Share of the model's own dense attention that falls on the selected pairs. The rest "
            "is dropped or compensated.",
        ),
    }
    parts = []
    for field, (title, text) in texts.items():
        measured = run.evaluation.get(field)
        if not measured:
            parts.append(page.paragraph(f"{title} is not in evaluation.json."))
            continue
        panels = {f"{title}, {when}": np.asarray(measured[when]) for when in ("before", "after")}
        names = layers or [str(number) for number in range(len(measured["before"]))]
        shown = _head_maps(run, f"{field}.png", panels, names, "share")
        parts += [page.heading(title), page.paragraph(text), shown]
    return parts


def _hit_rates(run: Run) -> list[Html]:
    """Return how many tokens stayed in their cluster along the samples; empty without any."""
    found = run.evaluation.get("hit_rate") or {}
    rows = [
        (when, side, percent(float(rate.mean())), percent(float(rate.min())))
        for when, of_layers in found.items()
        if of_layers
        for side, rate in zip("qk", np.asarray(of_layers).swapaxes(0, 1), strict=True)
    ]
    if not rows:
        return []
    text = (
        "Share of tokens that stayed in their cluster when a step of a sample clustered them from "
        "the step before."
    )
    titles = ("training", "tokens of", "mean of heads", "lowest head")
    return [page.heading("Hit rate of the codebooks"), page.table(titles, rows, text)]


def _moved(run: Run) -> list[Html]:
    """Return what training did to the masks: blocks of some heads, and each head's density."""
    parts: list[Html] = []
    layers = short_names(run.evaluation.get("layers", []))
    if found := maps.read_masks(run.folder / "evaluation" / "masks.npz"):
        parts.append(page.heading("Masks before and after training"))
        parts += maps.mask_maps(found, layers, run.report / "masks.png")
    density = run.evaluation.get("density")
    if density and run.evaluation.get("trained", False):
        parts.append(page.heading("Where the budgets moved"))
        parts += maps.budgets_moved(density, layers, run.report / "moved.png")
    return parts


def _mass_per_noise_level(run: Run) -> list[Html]:
    found = run.calibration
    if found is None or not found.get("captured_mass"):
        return []
    mass = np.asarray(found["captured_mass"])  # [L, H, T]
    panels = {"Mean over heads": mass.mean(1), "Lowest head": mass.min(1)}
    levels = [f"{level:.3g}" for level in found["noise_levels"]]
    title = "Captured mass per noise level, at calibration"
    path = theme.write(
        run.report / "mass.png",
        lambda colours: plots.heat_maps(
            colours,
            panels,
            rows=short_names(found["layers"]),
            columns=levels,
            axis="noise level",
            unit="captured mass",
        ),
    )
    return [page.heading(title), page.plot(path, title)]


def _head_maps(
    run: Run, name: str, panels: Mapping[str, Array], layers: Sequence[str], unit: str
) -> Html:
    num_heads = next(iter(panels.values())).shape[1]
    path = theme.write(
        run.report / name,
        lambda colours: plots.heat_maps(
            colours,
            panels,
            rows=short_names(layers),
            columns=[str(head) for head in range(num_heads)],
            axis="head",
            unit=unit,
        ),
    )
    return page.plot(path, " and ".join(panels))


def short_names(layers: Sequence[str]) -> list[str]:
    """Return `layer 3` for `blocks.3.attn1` where that tells the layers apart, else the names."""
    numbers = [re.search(r"\d+", layer) for layer in layers]
    short = [f"layer {number[0]}" for number in numbers if number]
    return short if len(set(short)) == len(layers) else list(layers)


def _video(run: Run, number: int, path: Path, samples: dict[str, Any]) -> list[Html]:
    sample = strips.Sample.read(path)
    title = f"Sample {number + 1}" + (f": {sample.caption}" if sample.caption else "")
    strip = strips.write_strip(sample, run.report / f"video-{number}.png")
    moving = strips.write_moving(sample, run.report / f"video-{number}.gif")
    psnr = [
        f"{when} {values[number]:.1f} dB"
        for when, values in (samples.get("psnr_to_teacher") or {}).items()
        if number < len(values)
    ]
    parts = [page.heading(title)]
    if psnr:
        parts.append(page.paragraph(f"PSNR to the teacher's sample: {', '.join(psnr)}.", "soft"))
    parts.append(page.image(strip, f"{title}, six frames of each model"))
    if moving is None:
        parts.append(page.paragraph("The moving picture was too large for this page.", "soft"))
    else:
        parts.append(page.image(moving, f"{title}, moving", moving=True))
    return parts


def _absent(title: str, text: str) -> Html:
    return page.section(title, page.paragraph(text))
