"""The sections of a report about how close the student is to its teacher."""

from typing import Any

import numpy as np

from gossamer.train.reporting import page, plots, theme
from gossamer.train.reporting.page import Html
from gossamer.train.reporting.run import Array, Run, VelocityError

EXAMPLE_TOKENS = 1_000


def percent(share: float | None) -> str:
    """Return a share as text in percent."""
    return "not recorded" if share is None else f"{100 * share:.1f} %"


def plus_minus(mean: float, deviation: float | None) -> str:
    """Return a mean with its standard deviation, where there is one."""
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def headline_section(figures: dict[str, Any]) -> Html:
    """Return the figures of `report.headline` as a sentence and a table."""
    if "heldout_loss" in figures:
        return _dense_headline(figures)
    seeds, levels = figures["num_seeds"], figures["num_noise_levels"]
    over = f"over {seeds} seeds" if seeds > 1 else "from one seed, so its spread is not known"
    rows = [
        ("relative velocity error, before distillation", f"{figures['error_before']:.4f}"),
        (
            "relative velocity error, after distillation",
            f"{plus_minus(figures['error_after'], figures['error_after_sd'])} ({over})",
        ),
        ("reduction", _reduction(figures)),
        ("held-out clips that improved", f"{figures['clips_improved']} of {figures['num_clips']}"),
        ("sparsity, requested", percent(figures["requested_sparsity"])),
        ("sparsity, planned at calibration", percent(figures["planned_sparsity"])),
        ("sparsity, measured before distillation", percent(figures["measured_sparsity_before"])),
        ("sparsity, measured after distillation", percent(figures["measured_sparsity"])),
        *_psnr_rows(figures),
        ("device", figures["device"] or "not recorded"),
    ]
    scope = (
        f"Means over {figures['num_clips']} held-out clips and {levels} noise levels; "
        "± is the standard deviation of the seeds' means."
    )
    return page.section(
        "Headline",
        page.paragraph(sentence(figures), "lead"),
        page.table(("measure", "value"), rows, scope),
    )


def sentence(figures: dict[str, Any]) -> str:
    """Return the headline of a student's run in plain words."""
    before, after = figures["error_before"], figures["error_after"]
    verb = "cut" if after < before else "raised"
    sparsity = figures["measured_sparsity"]
    start = "In this run" if sparsity is None else f"At {percent(sparsity)} sparsity"
    seeds = figures["num_seeds"]
    text = (
        f"{start}, distillation {verb} the sparse model's error against its dense teacher "
        f"from {before:.4f} to {after:.4f} ({abs(figures['reduction_percent']):.1f} % "
        f"{'lower' if after < before else 'higher'}) on {figures['num_clips']} held-out clips"
    )
    text += f", mean of {seeds} seeds." if seeds > 1 else ", one seed."
    deviation = figures["error_after_sd"]
    if deviation is not None and abs(before - after) <= 2 * deviation:
        text += " The change is within two standard deviations of the seeds: not established."
    return text


def meaning(run: Run) -> Html:
    """Return what the words mean, with an example at this run's sparsity."""
    sparsity = run.evaluation.get("sparsity", {}).get("measured_after") or 0.9
    pairs = EXAMPLE_TOKENS**2
    skipped = round(sparsity * pairs)
    return page.section(
        "What the numbers mean",
        page.paragraph(
            "Sparsity is the share of query-key token pairs that attention does not compute "
            "exactly; density is the rest. It counts real tokens, averaged over layers, heads, "
            "clips and noise levels. A pair that a compensation only approximates is not counted "
            "as computed."
        ),
        page.paragraph(
            f"Example: a video of {EXAMPLE_TOKENS:,} tokens has {EXAMPLE_TOKENS:,} × "
            f"{EXAMPLE_TOKENS:,} = {pairs:,} pairs in each head. At {percent(sparsity)} sparsity "
            f"{pairs - skipped:,} of them are computed exactly and {skipped:,} are not."
        ),
        page.paragraph(
            "Requested is the setting, planned what calibration expects of the masks it chose, "
            "measured what the masks select on the held-out clips. They differ a little, since a "
            "row keeps whole blocks and the masks follow the video."
        ),
        page.paragraph(
            "Relative velocity error is ‖student − teacher‖ / ‖teacher‖ for the velocity that "
            "both predict from the same noisy video: 0 is a perfect copy, 1 is as wrong as "
            "predicting nothing, 0.1 is a tenth of the teacher's length away. Before is the "
            "sparse model right after calibration, with the teacher's weights; after has the same "
            "mask budgets and distilled weights. Held-out clips are never trained on."
        ),
    )


def noise_levels(run: Run) -> Html:
    """Return the error against the teacher at each noise level."""
    error = VelocityError.read(run.evaluation)
    levels = np.asarray(run.evaluation["noise_levels"], dtype=np.float64)
    before, after = error.before.mean(0), error.after.mean((0, 1))
    over_seeds = _deviation(error.after.mean(1))
    clips_before, clips_after = _deviation(error.before), _deviation(error.after.mean(0))
    lines = {
        "before distillation": (before, np.zeros_like(before)),
        "after distillation": (after, over_seeds),
    }
    title = "Error against the teacher per noise level"
    path = theme.write(
        run.report / "error.png",
        lambda colours: plots.per_noise_level(
            colours, levels, lines, title=title, unit="relative velocity error"
        ),
    )
    has_spread = len(error.seeds) > 1
    rows = [
        (
            f"{levels[t]:.3g}",
            f"{before[t]:.4f}",
            f"{clips_before[t]:.4f}",
            plus_minus(after[t], over_seeds[t] if has_spread else None),
            f"{clips_after[t]:.4f}",
            f"{100 * (1 - after[t] / before[t]):.1f} %",
        )
        for t in range(len(levels))
    ]
    head = ("noise level", "before", "sd over clips", "after", "sd over clips", "reduction")
    spread = (
        f"± and error bars: standard deviation over {len(error.seeds)} seeds."
        if has_spread
        else "One seed, so there is no spread over seeds."
    )
    return page.section(title, page.plot(path, title), page.table(head, rows, spread))


def clips(run: Run) -> Html:
    """Return the error of each clip before and after, paired."""
    error = VelocityError.read(run.evaluation)
    before, after = error.before.mean(1), error.after.mean((0, 2))
    over_seeds = _deviation(error.after.mean(2))
    path = theme.write(
        run.report / "clips.png", lambda colours: plots.clips(colours, before, after, over_seeds)
    )
    change = after - before
    names = run.evaluation.get("clips") or [{"clip_id": f"clip {n}"} for n in range(len(before))]
    rows = [
        (
            names[n]["clip_id"],
            f"{before[n]:.4f}",
            plus_minus(after[n], over_seeds[n] if len(error.seeds) > 1 else None),
            f"{-100 * change[n] / before[n]:.1f} %",
        )
        for n in range(len(before))
    ]
    text = (
        f"{int((change < 0).sum())} of {len(before)} clips are closer to the teacher after "
        f"distillation. Mean paired change {change.mean():+.4f}"
    )
    text += f", standard deviation over clips {change.std(ddof=1):.4f}." if len(change) > 1 else "."
    head = ("clip", "before", "after", "reduction")
    return page.section(
        "Each clip before and after",
        page.paragraph(text),
        page.plot(path, "Error of each clip before against after distillation"),
        page.details("All clips as a table", page.table(head, rows)),
    )


def dense_noise_levels(run: Run) -> Html:
    """Return the flow-matching loss of a dense run at each noise level."""
    levels = np.asarray(run.evaluation["noise_levels"], dtype=np.float64)
    loss = run.evaluation["flow_matching_loss"]
    train, heldout = (np.asarray(loss[part], dtype=np.float64) for part in ("train", "heldout"))
    none = np.zeros_like(train)
    lines = {"training clips": (train, none), "held-out clips": (heldout, none)}
    title = "Flow-matching loss per noise level"
    path = theme.write(
        run.report / "error.png",
        lambda colours: plots.per_noise_level(
            colours, levels, lines, title=title, unit="mean squared velocity error"
        ),
    )
    rows = [
        (f"{level:.3g}", f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}")
        for level, a, b in zip(levels, train, heldout, strict=True)
    ]
    head = ("noise level", "training clips", "held-out clips", "gap")
    return page.section(title, page.plot(path, title), page.table(head, rows))


def _dense_headline(figures: dict[str, Any]) -> Html:
    train, heldout = figures["train_loss"], figures["heldout_loss"]
    text = (
        f"The dense model's flow-matching loss is {heldout:.4f} on held-out clips "
        f"and {train:.4f} on training clips."
    )
    rows = [
        ("flow-matching loss, training clips", f"{train:.4f}"),
        ("flow-matching loss, held-out clips", f"{heldout:.4f}"),
        ("gap", f"{heldout - train:+.4f}"),
    ]
    if figures["psnr_to_real"] is not None:
        rows.append(("samples against the real clips", f"{figures['psnr_to_real']:.2f} dB PSNR"))
    if figures["repeat_first_psnr"] is not None:
        repeated = f"{figures['repeat_first_psnr']:.2f} dB PSNR"
        rows.append(("the given frames held, against the real clips", repeated))
    rows.append(("device", figures["device"] or "not recorded"))
    scope = "Losses are means over the noise levels."
    table = page.table(("measure", "value"), rows, scope)
    return page.section("Headline", page.paragraph(text, "lead"), table)


def _reduction(figures: dict[str, Any]) -> str:
    text = f"{figures['reduction_percent']:.1f} %"
    deviation = figures["reduction_percent_sd"]
    return text if deviation is None else f"{text} ± {deviation:.1f}"


def _psnr_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = figures["psnr_before"], figures["psnr_after"]
    if before is None or after is None:
        return []
    return [
        ("samples against the teacher's, before and after", f"{before:.2f}, {after:.2f} dB PSNR")
    ]


def _deviation(values: Array) -> Array:
    """Return the standard deviation over the first axis; of a single row it is 0."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])
