"""Files of tensors and of rows: what safetensors reads, and any rows of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gossamer
from gossamer.train.files import sha256
from gossamer.train.refusal import Refusal
from gossamer.train.sharded import own_rows
from gossamer.train.tensor_files import Rows, stored, write

ROOT = Path(gossamer.__file__).parents[1]
TYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_safetensors_reads_what_is_written_bit_for_bit(tmp_path: Path) -> None:
    chance = torch.Generator().manual_seed(0)
    tensors = {
        str(kind): (torch.rand(3, 5, generator=chance) * 9).to(kind).t() for kind in TYPES
    } | {"scalar": torch.tensor(-0.0), "ä/none": torch.empty(0, 3), "row": torch.ones(4, 4)[1]}
    path = tmp_path / "x.safetensors"
    said = write(path, tensors)
    assert said == {"sha256": sha256(path), "size": path.stat().st_size}
    read = load_file(path)
    ours = stored("x", [path])
    assert read.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (read[name], ours[name][...]):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert bits(other) == bits(tensor)
    write(path, {})
    assert stored("x", [path]) == {}


def test_the_order_of_the_tensors_changes_no_byte(tmp_path: Path) -> None:
    tensors = {"b": Rows(torch.ones(2), 2, 4), "a": Rows(torch.ones(1), 0, 3), "c": torch.ones(1)}
    said = write(tmp_path / "x", tensors)
    assert write(tmp_path / "y", dict(reversed(tensors.items()))) == said


def in_parts(folder: Path, tensor: Tensor, cuts: list[int]) -> Any:
    """Write a tensor in parts that begin at `cuts`, last part first; return it as stored."""
    ends = [*cuts[1:], len(tensor)]
    paths = []
    for number, (first, last) in reversed(list(enumerate(zip(cuts, ends, strict=True)))):
        paths.append(folder / f"{number}.safetensors")
        write(paths[-1], {"w": Rows(tensor[first:last], first, len(tensor))})
    return stored("model", paths)["w"]


@pytest.mark.parametrize("cuts", [[0], [0, 4], [0, 1, 2, 6]])
def test_any_rows_of_a_tensor_in_parts_are_those_of_the_whole(
    cuts: list[int], tmp_path: Path
) -> None:
    tensor = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = in_parts(tmp_path, tensor, cuts)
    assert found.shape == tensor.shape and torch.equal(found[...], tensor)
    assert torch.equal(own_rows(found, torch.empty(7, 3)), tensor)
    for first in range(8):
        for last in range(first, 8):
            assert torch.equal(found[first:last], tensor[first:last])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(0, 4, 7)], "rows 0-4 of 7"),  # one is missing
        ([(4, 3, 7)], "rows 4-7 of 7"),
        ([(0, 4, 7), (3, 4, 7)], "rows 0-4 of 7, 3-7 of 7"),
        ([(0, 4, 7), (4, 3, 8)], "4-7 of 8"),
        ([(0, 7, 7), (0, 7, 7)], "0-7 of 7, 0-7 of 7"),
        ([(-1, 8, 7)], "rows -1-7 of 7"),
    ],
)
def test_parts_that_are_not_a_tensor_are_refused(
    parts: list[tuple[int, int, int]], said: str, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(parts))]
    for path, (first, rows, total) in zip(paths, parts, strict=True):
        write(path, {"w": Rows(torch.zeros(rows, 2), first, total)})
    with pytest.raises(Refusal, match=f"checkpoint model/w=.*{said}.*rows once"):
        stored("model", paths)


def test_rows_that_are_not_finite_are_refused_by_who_reads_them(tmp_path: Path) -> None:
    tensor = torch.zeros(6, 2)
    tensor[4, 1] = torch.inf
    found = in_parts(tmp_path, tensor, [0, 3])
    assert torch.equal(found[0:4], torch.zeros(4, 2))
    with pytest.raises(Refusal, match="model/w=NaN or infinity"):
        found[4:6]


@pytest.mark.parametrize("rows", ['{"w": [0]}', '{"w": "ab"}', "[1]", "no JSON"])
def test_odd_metadata_is_refused_with_its_file(rows: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.zeros(2, 2)}, path, metadata={"rows": rows})
    with pytest.raises(Refusal, match=r"odd\.safetensors"):
        stored("model", [path])


MEMORY = """
import sys
from pathlib import Path
import torch
from gossamer.train.tensor_files import stored, write

def mib(what):
    line = next(x for x in open("/proc/self/status") if x.startswith(what))
    return int(line.split()[1]) / 1024

path = Path(sys.argv[1]) / "x.safetensors"
tensors = {str(i): torch.ones(1024, 2048).t() for i in range(8)}  # 8 MiB each, to be copied
write(path, {"0": tensors["0"]})
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = mib("VmRSS")
write(path, tensors)
saving = mib("VmHWM") - before
before, loading = mib("RssAnon"), 0.0
for name, tensor in stored("model", [path]).items():
    tensors[name].copy_(tensor[...])
    loading = max(loading, mib("RssAnon") - before)
print(saving, loading)
"""


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Of eight tensors of 8 MiB, and less than one for what is around it."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    saving, loading = map(float, done.stdout.split())
    assert 7 < saving < 16 and loading < 8
