"""Why a calibration chose what it chose, in lines; each names the key that sets it by hand."""

from collections.abc import Iterator

from gossamer.train.calibration import Calibration


def reasons(found: Calibration) -> list[str]:
    """Return a line for each choice, then what the sparse model does with them."""
    return [*_grouping(found), *_clusters(found), *_budgets(found), *_outcome(found)]


def _grouping(found: Calibration) -> Iterator[str]:
    chosen = found.chosen
    (q, kv), shape = chosen["blocks"], chosen["block_shape"]
    size = f"{shape[0]} x {shape[1]} tokens" if shape else "any size, as clusters fall"
    yield (
        f"layout: {chosen['layout']}, {q} x {kv} blocks of {size}, as set (layout=..., layout.*): "
        "block shapes are the kernels' matter and not searched for"
    )
    if "heads_by_order" in chosen:
        counted = ", ".join(f"{name} {n}" for name, n in chosen["heads_by_order"].items())
        yield (
            f"token order of each head: {counted}; the static order of least error, where that is "
            f"at most {chosen['within']:g} times the error in clusters (layout.names, or "
            "layout_choice in calibration.json)"
        )
        yield (
            f"error in the chosen order over that in clusters: {chosen['over_clusters'][0]:.2f} in "
            f"the median head, {chosen['over_clusters'][1]:.2f} in the worst; heads that no "
            f"static order brings so near: {chosen['far_from_clusters']}"
            + (
                ""
                if chosen["clusters_allowed"]
                else "; sorted_clusters in layout.names serves them"
            )
        )


def _clusters(found: Calibration) -> Iterator[str]:
    chosen = found.chosen
    if "clusters" not in chosen:
        return
    tokens = chosen["video_tokens"]
    counts = ", ".join(
        f"{count} of {side} ({'as set' if given else f'{tokens} video tokens / {tokens // count}'})"
        for side, count, given in zip(
            "qk", chosen["clusters"], chosen["clusters_given"], strict=True
        )
    )
    yield (
        f"clusters in each head: {counts}; a 256th and a 64th of the tokens keep tiles of the "
        "kernels full (layout.num_q, layout.num_kv)"
    )
    keep = chosen["keep_until"]
    when = (
        "at every step of a sampler, from the last step's (layout.keep_until=null; a growth of the "
        "probe error, e.g. 0.2, with estimator=error_aware)"
        if keep is None
        else f"when the probe error has grown by {keep:.0%} since the last time (layout.keep_until)"
    )
    yield f"tokens are clustered again {when}; in training at every forward, as samples change"


def _budgets(found: Calibration) -> Iterator[str]:
    chosen = found.chosen
    low, high = chosen["lowest_density"], chosen["highest_density"]
    k, p = ([x for heads in of for x in heads] for of in (found.k, found.p))
    yield f"density by head: {low:.4f} to {high:.4f}, mean {found.planned_density:.4f}"
    if chosen["is_fixed"]:
        yield f"k {k[0]:.4g}, p {p[0]:.4g} for all heads: the policy's own (allocation=fixed)"
        return
    if "l1" in chosen:
        yield from _bounds(found)
        return
    if found.measure is None:
        why = "the same for all heads (allocation=uniform)"
    else:
        why = f"one for each head, since their errors ({found.measure}) differ"
    yield f"k: {min(k):.4g} to {max(k):.4g} of the {chosen['counts']}, {why}"
    if "bound" in chosen:
        yield (
            f"the last block given was worth {chosen['bound']:.3g} ({found.measure}); every block "
            "that is worth more is computed exactly"
        )
    yield (
        "p: 0 for all heads, budgets are Top-k: a share of Top-p had no less error at equal "
        "density and drifts on other clips (p in calibration.json; allocation=fixed policy.p=...)"
    )
    if "level_ratio" in chosen:
        yield (
            f"error ({found.measure}) of the worst noise level over the best, all heads: "
            f"{chosen['level_ratio']:.2f}; one budget serves all levels, since budgets of each "
            "level alone gained nothing"
        )


def _bounds(found: Calibration) -> Iterator[str]:
    k, p = ([x for heads in of for x in heads] for of in (found.k, found.p))
    yield (
        f"p: {min(p):.4g} to {max(p):.4g}, the least of each head whose relative L1 error is at "
        f"most {found.chosen['l1']:g} on every calibration clip (allocation.l1); k {k[0]:.4g}, the "
        "policy's own (policy.k)"
    )
    if found.skip_below:
        limits = [x for heads in found.skip_below for x in heads]
        yield (
            f"skip_below: {min(limits):.4g} to {max(limits):.4g}, the highest of each head that "
            f"keeps that error within {found.chosen['l2']:g} (allocation.l2)"
        )
    yield "the sparsity is what comes of it: raise the bounds for more"


def _outcome(found: Calibration) -> Iterator[str]:
    measured = found.chosen["measured_error"]
    by_level = ", ".join(
        f"t={t:g} {e:.4f}" for t, e in zip(found.noise_levels, measured, strict=True)
    )
    mean = sum(measured) / len(measured)
    yield f"relative velocity error of the sparse model: {mean:.4f} ({by_level})"
    if "predicted_error" in found.chosen:
        yield f"predicted from one head at a time: {found.chosen['predicted_error']:.4f}"
