"""benchmarks/parallel.py on the CPU: its processes agree, its table and its commands."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gossamer.benchmarks import parallel
from gossamer.benchmarks.parallel import WARM_UP, Mode, launch_command, main, markdown

TINY = ["--shape", "tiny", "--device", "cpu", "--precision", "no", "--sparsity", "0.5"]
BOTH = "fsdp2+ulysses-2"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.multi
def test_shards_of_shared_clips_take_the_steps_of_one_process(
    launcher: Any, tmp_path: Path
) -> None:
    arguments = [parallel.__file__, *TINY, "--steps", str(WARM_UP + 1), "--out", str(tmp_path)]
    single = launcher.run([*arguments, "--worker", "single"])
    assert single.code == 0, single.text
    done = launcher.ranks([*arguments, "--worker", BOTH], launch=FSDP)
    assert [one.code for one in done] == [0, 0], done[0].text

    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("single", BOTH))
    assert (one["processes"], two["processes"], two["clips"]) == (1, 2, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert len(two["seconds"]) == 1

    options = SimpleNamespace(shape="tiny", sparsity=0.5, precision="no")
    table = markdown(tmp_path, {"device": "cpu", "command": "x"}, options)
    assert "| single | 1 | 2 |" in table and "| fsdp2+ulysses-2 | 2 | 2 |" in table


def test_efficiency_counts_the_same_clips(tmp_path: Path) -> None:
    row = {"clips": 2, "tokens": 100, "losses": [2.0, 1.0], "norms": [1, 1], "peak_bytes": 2**30}
    for name, processes, seconds in (("single", 1, [4.0]), ("ddp", 2, [2.5, 2.4, 2.6])):
        found = {**row, "processes": processes, "seconds": seconds}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    links = {"processes": 2, "links": {"all-reduce": {str(2**20): 1.048576e-3}}}
    (tmp_path / "links.json").write_text(json.dumps(links))
    options = SimpleNamespace(shape="tiny", sparsity=0.5, precision="no")
    table = markdown(tmp_path, {"device": "cpu", "command": "x"}, options)
    ddp = next(line for line in table.splitlines() if line.startswith("| ddp"))
    assert "2.500 (2.400-2.600) | 80 | 1.60 | 80% | 1.0" in ddp
    assert "| all-reduce | 1.0 |" in table


@pytest.mark.parametrize(
    ("mode", "processes", "flags"),
    [
        ("single", 1, "--num_processes 1"),
        ("ulysses-2", 4, "--multi_gpu --num_processes 4"),
        ("fsdp2", 4, "--use_fsdp --fsdp_version 2 --num_processes 4"),
        ("hsdp", 4, "--parallelism_config_dp_shard_size 2 --num_processes 4"),
    ],
)
def test_each_mode_is_one_accelerate_launch(mode: str, processes: int, flags: str) -> None:
    options = SimpleNamespace(processes=4, precision="bf16", device="cuda")
    command = " ".join(launch_command(Mode(mode), options, ["--steps", "5"]))
    assert flags in command and f"gossamer.benchmarks.parallel --steps 5 --worker {mode}" in command
    assert Mode(mode).processes(4) == processes
    assert Mode(mode).sequence == (2 if "ulysses" in mode else 1)


@pytest.mark.parametrize("arguments", [["--modes", "pipeline"], ["--steps", str(WARM_UP)]])
def test_an_unknown_mode_and_too_few_steps_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert end.value.code == 2 and "allowed is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
