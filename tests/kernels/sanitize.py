"""Run the attention kernels over 30 awkward shapes, and clusters, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python tests/kernels/sanitize.py    (or --tool racecheck)
"""

import sys
from functools import partial

import torch

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.compensated_attention.op import compensated_attention

LENGTHS = ((1, 1), (63, 65), (64, 64), (65, 63), (129, 127), (200, 700), (700, 200), (1000, 1000))
SHAPES = [(q, kv, 128, 64) for q, kv in LENGTHS]
SHAPES += [(q, kv, 64, 64) for q, kv in LENGTHS]
SHAPES += [(q, kv, 128, 128) for q, kv in LENGTHS]
SHAPES += [(q, kv, 64, 128) for q, kv in LENGTHS[:6]]
CLUSTERS = ([0, 1, 130, 5, 300, 70], [130, 0, 5, 1, 300, 33, 3, 64])


def offsets(num_tokens: int, size: int) -> torch.Tensor:
    ends = [*range(0, num_tokens, size), num_tokens]
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def attend_clusters() -> None:
    q_offsets, kv_offsets = (
        torch.tensor([0, *sizes], device="cuda").cumsum(0).int() for sizes in CLUSTERS
    )
    lengths = [sum(sizes) for sizes in CLUSTERS]
    q, k, v = (
        torch.randn(2, 2, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (lengths[0], lengths[1], lengths[1])
    )
    selected = torch.rand(2, 2, *map(len, CLUSTERS), device="cuda") < 0.5
    blocks = Blocks.from_selected(selected, q_offsets, kv_offsets, *lengths)
    bias = torch.zeros(selected.shape, device="cuda", requires_grad=True)
    for attend in (block_sparse_attention, partial(compensated_attention, bias=bias)):
        out, _ = attend(q, k, v, blocks, backend="triton")
        out.float().square().sum().backward()


def main() -> None:
    backends = sys.argv[1:] or ["triton", "hopper"]
    torch.manual_seed(0)
    for num_q, num_kv, q_size, kv_size in SHAPES:
        q = torch.randn(2, 2, num_q, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.randn(2, 2, num_kv, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        q_offsets, kv_offsets = offsets(num_q, q_size), offsets(num_kv, kv_size)
        shape = (2, 2, q_offsets.numel() - 1, kv_offsets.numel() - 1)
        selected = torch.rand(shape, device="cuda") < 0.5
        blocks = Blocks.from_selected(
            selected, q_offsets, kv_offsets, q_size, kv_size, is_uniform=True
        )
        for backend in backends:
            for attend in (block_sparse_attention, compensated_attention):
                out, _ = attend(q, k, v, blocks, backend=backend)
                out.float().square().sum().backward()
    if "triton" in backends:
        attend_clusters()
    torch.cuda.synchronize()
    sys.stdout.write(f"{len(SHAPES)} shapes, {', '.join(backends)}\n")


if __name__ == "__main__":
    main()
