"""SVG-EAR's routing: the blocks of most error for their cost, within the budget of a Top-p set."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.block_select.op import budget_select, hybrid_select
from gossamer.sparse.mask import BlockMask, BlockScores
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.token_share import token_prefix

Scope = Literal["row", "head", "layer"]
SCOPES = ("row", "head", "layer")
Unit = Literal["blocks", "tokens"]
UNITS = ("blocks", "tokens")


class ErrorBudget(Hybrid):
    """Spend the token pairs of the Hybrid set of (k, p) on the blocks of most error per pair.

    The blocks of most mass, the share `guaranteed` of k and at least one a row, are always in
    (arXiv 2603.08982, 4.3, whose released code has k = 0.1, guaranteed = 0.5). The rest of the
    budget goes to blocks by score over tokens until it is reached: at most one block beyond it.
    scope "row" keeps each row to its own budget; "head" and "layer" pool the budgets of all rows
    of a head, or of the heads of a sample, which needs scores that compare (error_aware, output).
    unit "tokens" makes k the share of a head's token pairs, whatever the block sizes; p is then 0.

    Masks are nested as k grows with guaranteed = 0 only. Else a block that becomes guaranteed can
    displace one that was chosen by error; guaranteed blocks and pairs spent (to a block) do grow.
    One order in which both kinds take turns would be nested, but was measured to have 3 to 10 %
    more output error at 5 % density (synthetic clusters) and as much from 20 % on.
    """

    counts_blocks = False

    def __init__(
        self,
        *,
        k: float = 0.1,
        p: float = 0.0,
        guaranteed: float = 0.5,
        scope: Scope = "row",
        unit: Unit = "blocks",
        num_heads: int = 1,
    ) -> None:
        super().__init__(k=k, p=p, num_heads=num_heads)
        if scope not in SCOPES:
            raise ValueError(f"scope={scope}: allowed is {', '.join(SCOPES)}; set scope=row")
        if unit not in UNITS:
            raise ValueError(f"unit={unit}: allowed is {' or '.join(UNITS)}; set unit=blocks")
        if not 0 <= guaranteed <= 1:
            raise ValueError(
                f"guaranteed={guaranteed}: allowed is a share of k from 0 to 1; e.g. guaranteed=0.5"
            )
        self.guaranteed, self.scope, self.unit = float(guaranteed), scope, unit
        self._check_mass(self.p)

    def set_budget(self, k: Tensor, p: Tensor) -> None:
        """Set each head's k and p, both [H]; p is 0 with unit "tokens"."""
        self._check_mass(p)
        super().set_budget(k, p)

    def _check_mass(self, p: Tensor) -> None:
        if self.unit == "tokens" and bool(p.any()):
            raise ValueError(
                f"p={p.tolist()}: allowed is 0 with unit=tokens, where k alone decides; set "
                "unit=blocks, or policy=token_hybrid for a mass p with blocks of any size"
            )

    def check_given(self, given: Collection[str]) -> None:
        """Refuse scores without mass or, beyond a row, without comparable errors."""
        if "mass" not in given or (self.scope != "row" and "error" not in given):
            raise ValueError(
                f"policy.scope={self.scope}: allowed is an estimator that gives mass and, beyond a "
                "row, comparable errors; use estimator=error_aware with kind=output"
            )

    def forward(self, scores: BlockScores) -> BlockMask:
        self.check_given(scores.given)
        chosen = self._in_rows(scores) if self.scope == "row" else self._beyond_rows(scores)
        if scores.forced is not None:
            chosen = chosen | scores.forced
        return BlockMask(scores.q_layout, scores.kv_layout, chosen)

    def _in_rows(self, scores: BlockScores) -> Tensor:
        layouts, mass = (scores.q_layout, scores.kv_layout), scores.mass
        assert mass is not None
        if self.unit == "tokens":
            sure = token_prefix(mass, *layouts, self.k * self.guaranteed)
            score = scores.score.masked_fill(sure, torch.inf)
            return token_prefix(score, *layouts, self.k) | sure
        return budget_select(
            scores.score,
            mass,
            scores.q_layout.offsets,
            scores.kv_layout.offsets,
            self.k,
            self.p,
            guaranteed=self.guaranteed,
        )

    def _beyond_rows(self, scores: BlockScores) -> Tensor:
        layouts, mass = (scores.q_layout, scores.kv_layout), scores.mass
        assert mass is not None and scores.error is not None
        q_size, kv_size = scores.q_layout.sizes, scores.kv_layout.sizes
        gain = scores.score / kv_size.clamp(min=1)[..., None, :] * scores.error[..., None]
        cost = (q_size[..., :, None] * kv_size[..., None, :]).expand_as(gain)  # int64 token pairs
        if self.unit == "tokens":
            sure = token_prefix(mass, *layouts, self.k * self.guaranteed)
            planned = self.k.double()[:, None] * cost.sum(-1)  # [B, H, Nq]
        else:
            sure = hybrid_select(mass, self.k * self.guaranteed, torch.zeros_like(self.p))
            planned = (hybrid_select(mass, self.k, self.p) * cost).sum(-1)
        first = 2 if self.scope == "head" else 1
        spare = (planned - (sure * cost).sum(-1))[..., None].flatten(first).sum(-1, keepdim=True)
        chosen = _most(
            gain.masked_fill(sure, -1).flatten(first),
            cost.masked_fill(sure, 0).flatten(first),
            spare,
        )
        return chosen.view_as(sure) | sure


def _most(gain: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """Return bool [..., n]: the items of most gain until their cost [..., n] reaches the budget."""
    order = gain.argsort(dim=-1, descending=True, stable=True)
    ordered = cost.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    keep = (before < budget) & (ordered > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
