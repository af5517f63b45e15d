"""SpargeAttention's tuning of each head, by bisection on the relative L1 error of its output."""

import torch
from torch import Tensor

from gossamer.sparse.allocation import ErrorBound, least_within
from gossamer.sparse.filtered_drop import FilteredDrop
from gossamer.train.gauge import Gauge

P_STEPS = 10  # of bisection: 1 / 1024
WIDEST_GAP, GAP_STEPS = 50.0, 9  # in logits: about 0.1


def within_bounds(gauge: Gauge, allocation: ErrorBound) -> tuple[Tensor, Tensor]:
    """Return the policy's k and each head's least p within the bound, both [L, H].

    The gauge's second filter, if the method has one, is tuned after it and stays. Every step
    bisects all heads in one visit: 10 to 19 forward passes over the samples, and as many sparse
    attentions.
    """
    k = gauge.method.policy.k.cpu().repeat(len(gauge.layers), 1).expand(-1, gauge.heads)
    has_filter = isinstance(gauge.method.compensation, FilteredDrop)
    if has_filter:
        gauge.skip_below = torch.full_like(k, -torch.inf)
    p = least_within(
        lambda p: gauge.worst_error(k, p), allocation.l1, like=k, most=1.0, steps=P_STEPS
    )
    if has_filter:

        def at_gap(gap: Tensor) -> Tensor:
            gauge.skip_below = -gap
            return gauge.worst_error(k, p)

        gap = least_within(at_gap, allocation.l2, like=k, most=WIDEST_GAP, steps=GAP_STEPS)
        gauge.skip_below = -gap
    return k, p
