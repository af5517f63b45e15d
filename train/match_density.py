"""Sets one p for the masks of an evaluation, so that arms are compared at an equal density.

The density of Top-p follows the data and the weights: a p that met it on the calibration clips is
0.1 points off on others and 0.4 after training. Top-k's does not move.
"""

import logging

import torch
from omegaconf import DictConfig
from torch import nn

from gossamer.sparse.allocation import ErrorBound, Fixed, OneMass
from gossamer.sparse.attach import attentions
from gossamer.sparse.attention import SparseAttention
from gossamer.sparse.policies import Hybrid
from gossamer.train.config import build
from gossamer.train.loop import mean_density
from gossamer.train.measures import Sample
from gossamer.train.model import velocity
from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

CLOSE = 1e-4  # of the density to its target: 0.01 points
ROUNDS = 12
FIRST, MOST = 0.1, 1.0  # shift of the log-odds: of the second round, and of any


def check_match(cfg: DictConfig) -> None:
    """Refuse evaluation.match_density where no p decides the masks."""
    if not cfg.evaluation.match_density:
        return
    policy, allocation = build(cfg.policy), build(cfg.allocation)
    by_p = isinstance(allocation, OneMass | ErrorBound)
    by_p |= isinstance(allocation, Fixed) and bool(policy.p.any())
    if type(policy) is not Hybrid or not by_p or cfg.sparsity is None:
        raise Refusal(
            "evaluation.match_density",
            True,
            "false where no p decides the masks (Top-k budgets keep their density)",
            "set it to false, or allocation=one_mass with a sparsity",
        )


@torch.no_grad()
def match_density(model: nn.Module, samples: list[Sample], target: float) -> float:
    """Move p of all heads by one number in log-odds to a mean density of the samples' masks.

    Returns the density that is reached; a p of 0 or 1 stays. Secant steps, each a forward of the
    whole model on all samples.
    """
    policies = [a.policy for a in attentions(model).values() if isinstance(a, SparseAttention)]
    start = [policy.p.clone() for policy in policies]
    shift, density = 0.0, _density(model, samples)
    before = None
    for _ in range(ROUNDS):
        off = density - target
        if abs(off) <= CLOSE:
            break
        if before is None or before[1] == density:
            step = FIRST if off < 0 else -FIRST
        else:
            step = -off * (shift - before[0]) / (density - before[1])
        before = shift, density
        shift += max(-MOST, min(MOST, step))
        for policy, p in zip(policies, start, strict=True):
            policy.set_budget(policy.k, torch.sigmoid(torch.logit(p) + shift))
        density = _density(model, samples)
    p = torch.cat([policy.p for policy in policies])
    said = (100 * density, 100 * target, p.min(), p.max())
    log.info("density %.2f %% (asked: %.2f %%) with p from %.4f to %.4f", *said)
    return density


def _density(model: nn.Module, samples: list[Sample]) -> float:
    """Return the mean density of the masks over samples, layers and heads."""
    total, count = 0.0, 0
    for sample in samples:
        velocity(model, sample.x, sample.t, sample.text, sample.condition)
        total += mean_density(model) * len(sample.t)
        count += len(sample.t)
    return total / count
