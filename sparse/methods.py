"""Published training-free methods by name: rows of layout x estimator x policy x compensation."""

from difflib import get_close_matches
from typing import Any

from gossamer.sparse.attention import SparseMethod
from gossamer.sparse.compensation import Centroid, Drop
from gossamer.sparse.error_budget import ErrorBudget
from gossamer.sparse.estimators.error_aware import ErrorAware
from gossamer.sparse.estimators.head_pattern import HeadPattern as Band
from gossamer.sparse.estimators.mean_pool import MeanPool
from gossamer.sparse.layout import RowMajor
from gossamer.sparse.layouts.clusters import SemanticClusters
from gossamer.sparse.layouts.head_pattern import HeadPattern
from gossamer.sparse.policies import Hybrid
from gossamer.sparse.token_share import TokenHybrid

NAMES = ("sparge", "svg1", "svg2", "svg_ear")


def method_named(name: str, sparsity: float = 0.9, **layout: Any) -> SparseMethod:
    """Return a published method (one of NAMES) at a sparsity from 0 to below 1.

    The sparsity is a share of token pairs in every row or head, in place of the papers' Top-p, and
    met to a block; one block a row is always exact. `layout` goes to the layout's constructor.

    sparge is SpargeAttention's plug-and-play Top-k (`meansim_topk`), whose defaults switch guard
    and second filter off: both change the sparsity. With their Top-p it is SparseMethod(RowMajor(),
    MeanPool(similarity=0.6), Hybrid(k=0, p=0.9, keep_crossing=False), FilteredDrop()).
    svg1 takes the better of its two bands for each head. With e.g. max_error=0.5 a head that
    neither fits has blocks by MeanPool, within the same sparsity.
    svg_ear scores blocks by the change of the output; ErrorAware(kind="keys") is as published.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity}: allowed is a share of token pairs from 0 to below 1; e.g. 0.9"
        )
    k = 1 - sparsity
    match name:
        case "sparge":  # SpargeAttention, arXiv 2502.18137
            return SparseMethod(RowMajor(**layout), MeanPool(), Hybrid(k=k), Drop())
        case "svg1":  # arXiv 2502.01776
            order = HeadPattern(**{"density": k, **layout})
            return SparseMethod(order, Band(), Hybrid(k=k), Drop())
        case "svg2":  # arXiv 2505.18875
            return SparseMethod(SemanticClusters(**layout), MeanPool(), TokenHybrid(k=k), Drop())
        case "svg_ear":  # arXiv 2603.08982
            policy = ErrorBudget(k=k, unit="tokens")
            return SparseMethod(SemanticClusters(**layout), ErrorAware(), policy, Centroid())
    near = get_close_matches(str(name), NAMES, 1)
    raise ValueError(
        f"method={name}: allowed is {', '.join(NAMES)}; "
        + (f"did you mean {near[0]}?" if near else "name one of them")
    )
