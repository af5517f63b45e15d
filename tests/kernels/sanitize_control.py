"""Three toy kernels that say what compute-sanitizer's racecheck can judge: run one by its name.

compute-sanitizer --tool racecheck python tests/kernels/sanitize_control.py guarded

A producer warp hands numbers to a consumer warpgroup through one word of shared memory, as the
Hopper kernels do. `guarded` is right: an mbarrier for full and one for free. `captured` is Triton's
own hand-over of arguments to warp-specialised functions and nothing else. `broken` has the race
that must be found: the consumer does not wait.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

COUNT = 20


@gluon.jit
def _producer(box, full, free, count, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(count):
        if WAIT:
            mbarrier.wait(free, (i + 1) & 1)
        box.store(gl.full([1], i, gl.int32, layout))
        mbarrier.arrive(full, count=1)


@gluon.jit
def _consumer(box, full, free, count, out_ptr, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(count):
        if WAIT:
            mbarrier.wait(full, i & 1)
        gl.store(out_ptr + i, gl.sum(box.load(layout), axis=0))
        mbarrier.arrive(free, count=1)


@gluon.jit
def _hand_over(out_ptr, count, WAIT: gl.constexpr):
    box = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(free, count=1)
    gl.warp_specialize([
        (_consumer, (box, full, free, count, out_ptr, WAIT)),
        (_producer, (box, full, free, count, WAIT)),
    ], [1], [24])  # fmt: skip


@gluon.jit
def _write(out_ptr, count):
    gl.store(out_ptr, count)


@gluon.jit
def _captured(out_ptr, count):
    gl.warp_specialize([(_write, (out_ptr, count)), (_write, (out_ptr + 1, count))], [1], [24])


def main() -> None:
    out = torch.full((COUNT,), -1, device="cuda", dtype=torch.int32)
    match sys.argv[1:]:
        case ["guarded"]:
            _hand_over[(1,)](out, COUNT, True, num_warps=4)
        case ["broken"]:
            _hand_over[(1,)](out, COUNT, False, num_warps=4)
        case ["captured"]:
            _captured[(1,)](out, COUNT, num_warps=4)
        case _:
            raise SystemExit("give one of: guarded, captured, broken")
    sys.stdout.write(f"{out.tolist()}\n")


if __name__ == "__main__":
    main()
