"""Can the masks of a config have its sparsity, and can a backend run them? Reads no weights."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from gossamer.sparse.allocation import Allocation, ErrorBound, Fixed, OneMass
from gossamer.sparse.attach import method_from_spec
from gossamer.sparse.attention import SparseMethod, check_backend
from gossamer.sparse.layout import TokenGrid
from gossamer.sparse.policies import TrainedHybrid
from gossamer.sparse.token_share import TokenHybrid
from gossamer.train.calibration import CALIBRATION
from gossamer.train.config import build
from gossamer.train.refusal import Refusal

NO_ERROR_BUDGET = {
    Fixed: "fixed, where the policy's own k and p decide",
    OneMass: "one_mass, which meets a density",
    ErrorBound: "error_bound, whose bounds are allocation.l1 and l2",
}


def is_sparse(cfg: DictConfig) -> bool:
    """Say whether the run's attention is sparse: to a sparsity above 0, or to an error budget."""
    return cfg.error_budget is not None or cfg.sparsity > 0


def check_masks(
    cfg: DictConfig, model: nn.Module, grid: TokenGrid, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Refuse masks that cannot have the sparsity, or that no backend runs; return their facts."""
    spec = {n: build(cfg[n]) for n in ("layout", "estimator", "policy", "compensation")}
    try:
        method = method_from_spec({**spec, "backend": cfg.backend})
    except ValueError as error:
        estimator, allowed = type(spec["estimator"]).__name__, "one that the other parts fit"
        raise Refusal("estimator", estimator, allowed, str(error)) from error
    allocation = build(cfg.allocation)
    check_allocation(allocation, method.policy, cfg.error_budget)
    if not isinstance(allocation, Fixed | ErrorBound):
        _refuse_drifting(method)
    try:
        num_q, num_kv = method.layout.num_blocks(grid)
    except ValueError as error:
        layout, allowed = type(method.layout).__name__, f"one that fits {grid.num_video} tokens"
        raise Refusal("layout", layout, allowed, str(error)) from error
    most = _most_sparsity(allocation, method, num_kv)
    if cfg.sparsity is not None and cfg.sparsity > most + 1e-6:  # k is fp32
        kept = f"{(1 - most) * num_kv:.3g} of {num_kv} blocks a row"
        raise Refusal(
            "sparsity",
            cfg.sparsity,
            f"at most {most:.4f} ({kept} must stay)",
            "lower sparsity, make the layout's blocks smaller, or lower policy.k where "
            "allocation=fixed",
        )
    head_dim = int(model.config.attention_head_dim)  # type: ignore[arg-type]
    try:
        backend = check_backend(method, head_dim=head_dim, dtype=dtype, device=device)
    except ValueError as error:
        raise Refusal("backend", cfg.backend, "a backend that can run this", str(error)) from error
    _check_calibration_path(cfg)
    shape = method.layout.block_shape
    of = f"of {shape[0]} x {shape[1]}" if shape else "of any size"
    return {
        "backend": backend,
        "blocks": f"{num_q} x {num_kv} {of}",
        **{name: cfg[name] for name in ("sparsity", "error_budget") if cfg[name] is not None},
    }


def check_allocation(allocation: Allocation, policy: Any, error_budget: float | None) -> None:
    """Refuse an allocation that cannot meet an error budget, or that finds a p no policy takes."""
    own = NO_ERROR_BUDGET.get(type(allocation), "")
    if error_budget is not None and own:
        fix = "choose another allocation, or give sparsity instead"
        raise Refusal("error_budget", error_budget, f"null with allocation={own}", fix)
    if isinstance(allocation, OneMass | ErrorBound) and _unit(policy) == "tokens":
        allowed = f"blocks with allocation={own.partition(',')[0]}, which finds a mass p"
        fix = "set policy=token_hybrid for blocks of any size"
        raise Refusal("policy.unit", "tokens", allowed, fix)


def _unit(policy: Any) -> str:
    """Return what the policy's k is a share of."""
    return getattr(policy, "unit", "blocks")


def _refuse_drifting(method: SparseMethod) -> None:
    """Refuse budgets that calibration cannot keep: clips differ in the sizes of their clusters."""
    policy = method.policy
    if method.layout.block_shape is not None or isinstance(policy, TokenHybrid | TrainedHybrid):
        return
    if _unit(policy) == "blocks":
        raise Refusal(
            "policy",
            f"{type(policy).__name__} in blocks",
            "token_hybrid, error_budget with policy.unit=tokens, or trained_hybrid, with blocks of "
            "any size (clusters): a share of blocks is no density",
            "set policy=token_hybrid, or allocation=fixed to take the density as it comes",
        )


def _most_sparsity(allocation: Allocation, method: SparseMethod, num_blocks: int) -> float:
    """Return the sparsity left by the fewest blocks a row that the budgets can keep."""
    if not isinstance(allocation, Fixed | ErrorBound):
        return 1 - 1 / num_blocks
    return 1 - max(1 / num_blocks, float(method.policy.k[0]))


def _check_calibration_path(cfg: DictConfig) -> None:
    path = cfg.calibration.path
    if path is not None and not (Path(path) / CALIBRATION).is_file():
        raise Refusal(
            "calibration.path", path, f"a folder with {CALIBRATION}", "give null to calibrate anew"
        )
