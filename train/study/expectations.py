"""What the study expected, and what its results say of each: computed, never written by hand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.train.study.data import Array, Cell, Study
from gossamer.train.study.statistics import Estimate, bootstrap, difference, ratio

MOST_ERROR, MOST_STEPS = 0.6, 0.05  # of C's, at 95 %
FAR = 0.9  # of its start's error: at least a tenth less
WITHIN = 0.5  # dB of the teacher against real clips, at 90 %
BAR = 1.0  # dB of the teacher above repeating the first frame
SAME_DENSITY = 0.001
MISMATCHED = ("few", "other")


@dataclass(frozen=True)
class Verdict:
    """One expectation, whether it held, and the figures that say so."""

    expected: str
    status: str  # held | held on average | did not hold | not measured
    found: str


def verdicts(study: Study) -> list[Verdict]:
    """Return a verdict on each expectation of the study, in its order."""
    return [
        *_first(study),
        *_far_above_the_start(study),
        *_teacher_matters(study),
        *(_compared(study, "E", "D", s, "trained budgets") for s in study.sparsities),
        *(
            _compared(study, "D", other, s, f"our calibration against {words} alone")
            for other, words in (("G", "Top-k"), ("H", "Top-p"))
            for s in study.sparsities
        ),
        *_close_to_real(study),
    ]


def steps_to(curve: Array, error: float) -> tuple[float, float] | None:
    """Return the first step of a curve at or below an error, and the seconds until then."""
    reached = np.flatnonzero(curve[:, 2] <= error)
    return (float(curve[reached[0], 0]), float(curve[reached[0], 1])) if len(reached) else None


def _first(study: Study) -> Iterator[Verdict]:
    f, c = study.get("F", 0.95), study.get("C", 0.95)
    expected = f"At 95 %, F's final error is at most {MOST_ERROR} of C's at equal steps"
    if f is None or c is None:
        yield Verdict(expected, "not measured", "F or C at 95 % is not in the results.")
    else:
        share = _errors(f, c, ratio)
        yield Verdict(expected, _at_most(share, MOST_ERROR), f"F / C = {share.text()}.")
    expected = f"At 95 %, F reaches C's final error in at most {100 * MOST_STEPS:g} % of C's steps"
    curves = [cell.curve if cell else None for cell in (f, c)]
    if curves[0] is None or curves[1] is None:
        yield Verdict(expected, "not measured", "There are no learning curves of F and C.")
        return
    steps, last = curves[1][-1, 0], curves[1][-1, 2]
    reached = steps_to(curves[0], last)
    if reached is None:
        text = f"F does not reach C's {last:.3f}; its own last error is {curves[0][-1, 2]:.3f}."
        yield Verdict(expected, "did not hold", text)
        return
    share_of_time = 100 * reached[1] / curves[1][-1, 1]
    seconds = "" if np.isnan(share_of_time) else f", {share_of_time:.1f} % of the GPU-seconds"
    yield Verdict(
        expected,
        "held" if reached[0] <= MOST_STEPS * steps else "did not hold",
        f"F is at C's last error, {last:.3f} on the watched clips, at step {reached[0]:.0f} of "
        f"{steps:.0f}: {100 * reached[0] / steps:.1f} % of the steps{seconds}.",
    )


def _far_above_the_start(study: Study) -> Iterator[Verdict]:
    trained = [arm for arm in study.arms if not arm.startswith("A-")]
    mismatched = [arm for arm in trained if arm.partition("-")[2] in MISMATCHED]
    for arms, words, s in (
        *(([arm for arm in trained if arm not in mismatched], "", s) for s in study.sparsities),
        *((mismatched, " on mismatched data", s) for s in study.sparsities if mismatched),
    ):
        expected = (
            f"At {100 * s:g} %, every arm trained{words} is far from its training-free start: at "
            f"most {FAR} of its error"
        )
        cells = [cell for arm in arms if (cell := study.cells.get((arm, s))) and cell.trained]
        shares = {
            cell.arm: bootstrap([_mean(cell.after), _mean(cell.before)], cell.shots, ratio)
            for cell in cells
            if cell.after is not None and cell.before is not None
        }
        if not shares:
            yield Verdict(expected, "not measured", "No trained arm is in the results.")
            continue
        each = {arm: _at_most(share, FAR) for arm, share in shares.items()}
        order = ("did not hold", "held on average", "held")
        worst = min(each.values(), key=order.index)
        listed = "; ".join(f"{arm} {share.text(2)}" for arm, share in shares.items())
        yield Verdict(expected, worst, f"After / before: {listed}.")


def _teacher_matters(study: Study) -> Iterator[Verdict]:
    for kind in MISMATCHED:
        for s in study.sparsities:
            if (f"C-{kind}", s) in study.cells or kind == MISMATCHED[0]:
                what = f"distillation against the diffusion loss on mismatched data ({kind})"
                yield _compared(study, f"C-{kind}", f"B-{kind}", s, what)


def _compared(study: Study, arm: str, other: str, sparsity: float, what: str) -> Verdict:
    expected = f"At {100 * sparsity:g} %, {arm} is better than {other}: {what}"
    a, b = study.cells.get((arm, sparsity)), study.cells.get((other, sparsity))
    if a is None or b is None:
        return Verdict(expected, "not measured", f"{arm} or {other} is not in the results.")
    share = _errors(a, b, ratio)
    text = f"{arm} / {other} = {share.text()}."
    if a.density is not None and b.density is not None:
        gap = a.density - b.density
        if abs(gap) > SAME_DENSITY:
            text += f" Their densities differ: {100 * a.density:.2f} and {100 * b.density:.2f} %."
    return Verdict(expected, _at_most(share, 1.0), text)


def _close_to_real(study: Study) -> Iterator[Verdict]:
    expected = (
        f"At 90 %, the best arm is within {WITHIN} dB of the teacher against real clips, and the "
        f"teacher at least {BAR:g} dB above repeating the first frame"
    )
    found: list[tuple[Cell, Array, Array]] = []
    for arm in study.arms:
        cell = study.cells.get((arm, 0.9))
        if cell is not None and cell.trained:
            own, teacher = (cell.quality(f"real/{x}", "psnr") for x in ("after", "teacher"))
            if own is not None and teacher is not None:
                found.append((cell, own, teacher))
    if not found:
        yield Verdict(expected, "not measured", "No trained arm at 90 % has samples.")
        return
    cell, own, teacher = max(found, key=lambda each: each[1].mean())
    gap = bootstrap([teacher, own], cell.sampled_shots, difference)
    repeat = cell.quality("real/first", "psnr")
    text = f"{cell.arm} is {gap.text(2)} dB below the teacher ({teacher.mean():.2f} dB)."
    status = _at_most(gap, WITHIN)
    if repeat is not None:
        above = bootstrap([teacher, repeat], cell.sampled_shots, difference)
        text += f" The teacher is {above.text(2)} dB above repeating the first frame."
        bar = _at_most(Estimate(-above.value, -above.high, -above.low), -BAR)
        status = min(status, bar, key=("did not hold", "held on average", "held").index)
    yield Verdict(expected, status, text)


def _errors(a: Cell, b: Cell, statistic: Callable[[Array, Array], float]) -> Estimate:
    return bootstrap([_mean(a.after), _mean(b.after)], a.shots, statistic)


def _mean(errors: Array | None) -> Array:
    """Return errors [seed, clip], the mean over noise levels."""
    assert errors is not None
    return errors.mean(-1)


def _at_most(found: Estimate, limit: float) -> str:
    """Return the status of a figure that should be below a limit: two equal arms do not differ."""
    if found.high < limit:
        return "held"
    return "held on average" if found.value < limit else "did not hold"


def summary(found: Sequence[Verdict]) -> str:
    """Return how many expectations held, in one sentence."""
    words = ("held", "held on average", "did not hold", "not measured")
    counted = (f"{sum(v.status == word for v in found)} {word}" for word in words)
    return f"Of {len(found)} statements: {', '.join(counted)}."
