"""How concentrated a dense model's attention is: the mass in the best blocks of each row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from gossamer.sparse.attach import attentions, method_from_spec
from gossamer.sparse.attention import SparseAttention
from gossamer.train.measures import Seen, visit_layers
from gossamer.train.samples import evenly, noisy_samples

if TYPE_CHECKING:
    from gossamer.train.job import Job

SHARES = (0.03, 0.05, 0.1, 0.2)


def best_mass(mass: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Return the mass in the best blocks of a row, [H, shares], of mass [B, H, Nq, Nk].

    A share of Nk is rounded to whole blocks, at least one; rows and batch are averaged.
    """
    counts = [max(1, round(share * mass.shape[-1])) for share in shares]
    reached = mass.sort(-1, descending=True)[0].cumsum(-1)[..., [n - 1 for n in counts]]
    return reached.double().mean((0, 2))


def mass_curves(job: "Job", clips: int, shares: Sequence[float] = SHARES) -> Tensor:
    """Return best_mass of the run's dense model on held-out clips, [L, levels, H, shares].

    Blocks are those of the run's layout; clips are evenly spaced, one forward for each and level.
    """
    teacher, dataset = job.dense(), job.dataset("heldout")
    levels = list(job.cfg.evaluation.noise_levels)
    chosen = [dataset[i] for i in evenly(len(dataset), clips)]
    samples = noisy_samples(chosen, levels, 1, job.device)
    heads = int(teacher.config.num_attention_heads)  # type: ignore[arg-type]
    width = int(teacher.config.attention_head_dim)  # type: ignore[arg-type]
    method = method_from_spec(job.method_spec)
    attention = SparseAttention(method, heads, width).to(job.device)
    found = torch.zeros(
        len(attentions(teacher)), len(levels), heads, len(shares), dtype=torch.float64
    )

    for sample in tqdm(samples, desc="attention mass", unit="batch"):
        of_level = found[:, sample.level]

        def visit(seen: Seen, of_level: Tensor = of_level) -> None:
            mass = seen.under(attention).mass
            of_level[seen.index] += best_mass(mass, shares).cpu() / len(chosen)

        with job.autocast():
            visit_layers(teacher, sample, visit, measure=None)
    return found


def tables(found: Tensor, levels: Sequence[float], shares: Sequence[float] = SHARES) -> str:
    """Return mass_curves as Markdown: quartiles over layers and heads by level, means by layer."""
    columns = [f"{100 * share:g} %" for share in shares]
    lines = ["| noise level | " + " | ".join(f"{c}: q25 / median / q75" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    ways = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for name, of_level in [(f"{t:g}", found[:, i]) for i, t in enumerate(levels)] + [
        ("all", found.mean(1))
    ]:
        quartiles = of_level.flatten(0, 1).quantile(ways, dim=0).T.tolist()
        lines.append(f"| {name} | " + " | ".join(_joined(row) for row in quartiles) + " |")
    lines += ["", "| layer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for layer, row in enumerate(found.mean((1, 2)).tolist()):
        lines.append(f"| {layer} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    return "\n".join(lines) + "\n"


def _joined(numbers: Sequence[float]) -> str:
    return " / ".join(f"{x:.2f}" for x in numbers)
