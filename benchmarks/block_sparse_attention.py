"""Time block_sparse_attention forward and backward against dense SDPA in the same run, on a GPU.

    python benchmarks/block_sparse_attention.py --commit HASH > benchmarks/results/NAME.md

Uniform random masks with the same count in every row. TFLOP/s count kept pairs only, 4 D a pair
forward and 10 D backward; building the index lists is not in these times.
"""

import argparse
import statistics
import sys
from datetime import date

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.kernels.block_sparse_attention.op import block_sparse_attention
from gossamer.kernels.blocks import Blocks
from gossamer.kernels.dense_attention.op import dense_attention

SHAPES = {"A": (12, 32768, 128), "B": (8, 75776, 128)}
BLOCKS = ((64, 64), (128, 64), (128, 128))
SPARSITIES = (0.8, 0.9, 0.95)


def milliseconds(run, repeats: int = 12) -> tuple[float, float]:
    """Return the median and the 20-80 % width of a run's time in ms, after three warm-ups."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    quantiles = statistics.quantiles(times, n=5)
    return statistics.median(times), quantiles[3] - quantiles[0]


def forward_and_backward(attend, leaves: list[Tensor]) -> tuple[tuple[float, float], ...]:
    """Time attend(q, k, v) and its backward; out and its gradient have one layout."""
    with torch.no_grad():
        forward = milliseconds(lambda: attend(*leaves))
    out = attend(*leaves)
    gradient = torch.randn_like(out)
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True))
    return forward, backward


def random_blocks(heads: int, tokens: int, q_block: int, kv_block: int, sparsity: float) -> Blocks:
    """Return a mask with the same number of random kv blocks in every row."""
    rows, columns = tokens // q_block, tokens // kv_block
    count = round(columns * (1 - sparsity))
    chosen = torch.rand(1, heads, rows, columns, device="cuda").topk(count, dim=-1).indices
    selected = torch.zeros(1, heads, rows, columns, dtype=torch.bool, device="cuda")
    selected.scatter_(-1, chosen, True)
    q_offsets = torch.arange(0, tokens + 1, q_block, dtype=torch.int32, device="cuda")
    kv_offsets = torch.arange(0, tokens + 1, kv_block, dtype=torch.int32, device="cuda")
    return Blocks.from_selected(selected, q_offsets, kv_offsets, q_block, kv_block)


def row(name: str, flops: float, times, dense) -> str:
    """Return one table row; `dense` holds the dense times of the same shape."""
    (forward, f_width), (backward, b_width) = times
    rates = f"{flops / forward / 1e9:.0f} | {2.5 * flops / backward / 1e9:.0f}"
    total = sum(t for t, _ in dense) / (forward + backward)
    return (
        f"| {name} | {forward:.3f} ± {f_width:.3f} | {backward:.3f} ± {b_width:.3f} | {rates} "
        f"| {dense[0][0] / forward:.2f}x | {dense[1][0] / backward:.2f}x | {total:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--shapes", default="A,B")
    options = parser.parse_args()
    lines = [
        "# block_sparse_attention, Triton backend",
        "",
        f"Device {torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{triton.__version__}, commit {options.commit}, {date.today()}. Command: "
        f"`python {' '.join(sys.argv)}`. bf16, batch 1, median ± 20-80 % width of 12 runs.",
    ]
    header = (
        "| kernel | forward ms | backward ms | fwd TFLOP/s | bwd TFLOP/s "
        "| fwd vs dense | bwd vs dense | both |\n|---|---|---|---|---|---|---|---|"
    )
    for shape in options.shapes.split(","):
        heads, tokens, dim = SHAPES[shape]
        leaves = [
            torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        ]
        full = 4.0 * heads * tokens * tokens * dim
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            dense = forward_and_backward(dense_attention, leaves)
        lines += ["", f"## Shape {shape}: {heads} heads x {tokens} tokens x {dim}", "", header]
        lines.append(row("dense SDPA (cuDNN)", full, dense, dense))
        for q_block, kv_block in BLOCKS:
            for sparsity in SPARSITIES:
                blocks = random_blocks(heads, tokens, q_block, kv_block, sparsity)

                def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks = blocks) -> Tensor:
                    return block_sparse_attention(q, k, v, blocks, backend="triton")[0]

                times = forward_and_backward(attend, leaves)
                name = f"{q_block}x{kv_block} at {sparsity:.0%}"
                lines.append(row(name, full * (1 - sparsity), times, dense))
                sys.stderr.write(lines[-1] + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
