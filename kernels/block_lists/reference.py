"""Index lists in plain PyTorch, by a sort."""

import torch
from torch import Tensor


def forward(selected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counts and lists of the rows, then those of the columns."""
    return *_lists(selected.contiguous()), *_lists(selected.transpose(-1, -2).contiguous())


def _lists(selected: Tensor) -> tuple[Tensor, Tensor]:
    num_columns = selected.shape[-1]
    column = torch.arange(num_columns, dtype=torch.int32, device=selected.device)
    ordered = torch.where(selected, column, num_columns).sort(dim=-1).values  # unselected last
    return selected.sum(-1, dtype=torch.int32), ordered.masked_fill_(ordered == num_columns, 0)
