"""One of two processes with shards in bf16: the forward is autocast's, gradients reduce in fp32.

What it has of the weights is what it writes to a checkpoint, and all that it reads back.

Run by test_parallel.py.
"""

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gossamer.sparse.attach import attach
from gossamer.train import checkpoint
from gossamer.train.launch import Launch
from gossamer.train.model import ScratchWan, velocity
from gossamer.train.parallel import Parallel
from gossamer.train.processes import Together
from gossamer.train.sharded import AdamW, local, own_parts, shared_like, whole
from gossamer.train.tensor_files import StoredTensor


def loss_of(model: nn.Module, accelerator: Accelerator) -> Tensor:
    """Return the loss of this process's own clip."""
    generator = torch.Generator().manual_seed(accelerator.process_index)
    x = torch.randn(1, 4, 2, 8, 8, generator=generator)
    text = torch.randn(1, 4, 16, generator=generator)
    with accelerator.autocast():
        return velocity(model, x, torch.tensor([0.9991]), text, None).square().mean()


def check_checkpoint(sharded: nn.Module, together: Together) -> None:
    """Write a model and read it back; count the bytes of this process."""
    own = dict(sharded.named_parameters())
    nbytes = sum(local(p).nbytes for p in own.values())
    unshared = sum(p.nbytes for p in own.values() if not isinstance(p, DTensor))
    folder = Path(together.gather(tempfile.mkdtemp())[0])
    parts = own_parts(own, others=together.is_first)
    path = checkpoint.save(folder, 1, tensors={"model": parts}, state={}, keep=2, together=together)
    assert path is not None
    written = (path / f"model-0000{together.rank + 1}-of-00002.safetensors").stat().st_size
    expected = nbytes if together.is_first else nbytes - unshared
    assert expected < written < expected + 256 * (len(own) + 1)  # its header
    read, counts = StoredTensor.__getitem__, []

    def counted(self: StoredTensor, rows: object) -> Tensor:
        tensor = read(self, rows)
        counts.append(tensor.nbytes)
        return tensor

    StoredTensor.__getitem__ = counted
    stored = checkpoint.read(path)[0]["model"]
    for name, parameter in own.items():
        again = shared_like(stored[name], parameter)
        assert torch.equal(local(again), local(parameter)), name
        assert torch.equal(whole(again), whole(parameter)), name
    assert sum(counts) == nbytes and len(counts) == len(own)
    together.gather(None)  # before the first one removes what the other reads
    if together.is_first:
        shutil.rmtree(folder)


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    source = ScratchWan(num_layers=2, num_heads=2, head_dim=16, ffn_dim=64, channels=4, text_dim=16)
    model = attach(source.load(0), None).train()
    parallel = Parallel(accelerator, Launch(2, shard=2))
    sharded = parallel.place(deepcopy(model))

    names = {n for n, p in sharded.named_parameters() if isinstance(p, DTensor)}
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and "scale_shift" not in n}
    assert names == matrices
    assert all(p.dtype == torch.float32 for p in sharded.parameters())

    expected, loss = loss_of(model, accelerator), loss_of(sharded, accelerator)
    assert torch.equal(loss, expected)  # bit for bit: no input is cast, least of all the timestep
    expected.backward()
    loss.backward()
    parameters = list(sharded.parameters())
    parallel.average_whole(parameters)
    for (name, one), other in zip(model.named_parameters(), parameters, strict=True):
        if one.grad is None:
            continue
        dist.all_reduce(one.grad)
        mean, own = one.grad / 2, whole(other.grad)
        if name.startswith("blocks"):  # before them gradients add up in bf16, in another order
            assert torch.equal(own, mean), name
        assert (own - mean).norm() < 0.01 * mean.norm(), name

    norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf) / 2
    found = parallel.norm(parameters)
    assert abs(float(found) - float(norm)) < 1e-5 * norm
    parallel.clip(parameters, found, torch.inf)
    assert torch.equal(parallel.norm(parameters), found)
    parallel.clip(parameters, found, 1e-3)
    assert abs(float(parallel.norm(parameters)) - 1e-3) < 1e-6

    for one, other in zip(model.parameters(), parameters, strict=True):
        one.grad = None if other.grad is None else whole(other.grad)
    for group, kind in ((list(model.parameters()), torch.optim.AdamW), (parameters, AdamW)):
        optimizer = kind(group, lr=0.1, fused=True)  # as on a GPU
        optimizer.step()
        optimizer.step()
    for (name, one), other in zip(model.named_parameters(), parameters, strict=True):
        assert torch.equal(whole(other), one), name
    check_checkpoint(sharded, parallel.together)
    accelerator.end_training()
    print("all agree")  # noqa: T201


if __name__ == "__main__":
    main()
