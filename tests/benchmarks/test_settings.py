"""key=value arguments select what is measured; a wrong one is refused in one line with a fix."""

from pathlib import Path

import pytest
import torch
import yaml

from gossamer.benchmarks.cases import SHAPES, Shape
from gossamer.benchmarks.contestants import CONTESTANTS
from gossamer.benchmarks.settings import HELP, PHASES, RESULTS, Settings, describe, parse
from gossamer.train.cli import main
from gossamer.train.refusal import Refusal


def test_nothing_given_measures_every_contestant_row_and_phase_of_shape_a() -> None:
    settings = parse([])
    assert settings == Settings()
    assert settings.shape == (SHAPES["A"],) and settings.rows == ("uniform", "skewed")
    assert settings.contestant == tuple(CONTESTANTS) and settings.phase == PHASES


def test_lists_select_slices() -> None:
    selected = "shape=B,2x100x16,B block=64x64,128x64 sparsity=0,0.95 rows=skewed"
    rest = "contestant=flex,triton phase=mask seconds=60 commit=abc out=x"
    settings = parse([*selected.split(), *rest.split()])
    assert settings == Settings(
        shape=(SHAPES["B"], Shape("2x100x16", 2, 100, 16)),
        block=((64, 64), (128, 64)),
        sparsity=(0.0, 0.95),
        rows=("skewed",),
        contestant=("flex", "triton"),
        phase=("mask",),
        seconds=60.0,
        commit="abc",
        out=Path("x"),
    )


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("shap=A", "did you mean shape?"),
        ("reps", "gossamer bench --help"),
        ("shape=D", "HEADSxTOKENSxDIM"),
        ("shape=2x0x16", "HEADSxTOKENSxDIM"),
        ("block=64", "write block=128x64"),
        ("block=64x-1", "at least 1 token"),
        ("sparsity=95", "write sparsity=0.95"),
        ("sparsity=1", "from 0 to below 1"),
        ("sparsity=nan", "from 0 to below 1"),
        ("sparsity=0.3", "write rows=uniform"),
        ("rows=skew", "did you mean skewed?"),
        ("contestant=tritn", "did you mean triton?"),
        ("contestant=reference", "dense-cudnn"),
        ("phase=backwards", "did you mean backward?"),
        ("seconds=0", "a number above 0"),
        ("seconds=", "a value"),
    ],
)
def test_bad_arguments_are_refused_with_a_fix(argument: str, said: str) -> None:
    with pytest.raises(Refusal) as refusal:
        parse([argument])
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_low_sparsity_is_fine_without_skew() -> None:
    assert parse(["sparsity=0.3", "rows=uniform"]).sparsity == (0.3,)


def test_every_setting_is_explained_and_shown_as_yaml() -> None:
    shown = yaml.safe_load(describe(parse(["block=128x64", "sparsity=0.9"])))
    assert list(shown) == list(HELP)
    assert (shown["block"], shown["sparsity"], shown["out"]) == ("128x64", 0.9, None)


def test_results_are_never_written_over(tmp_path: Path) -> None:
    settings = parse([f"out={tmp_path / 'new'}"])
    assert settings.folder() == tmp_path / "new"
    (tmp_path / "new" / RESULTS[1]).touch()
    with pytest.raises(Refusal, match="a folder without results"):
        settings.folder()


def test_without_out_a_folder_under_runs_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = parse([]).folder()
    assert folder.parent == Path("runs") and folder.name.startswith("bench-") and folder.is_dir()


def test_without_a_gpu_the_verb_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", f"out={tmp_path / 'new'}"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: device=cpu: allowed is cuda; bench needs a GPU\n"
    assert captured.out == "" and not (tmp_path / "new").exists()


def test_the_verb_refuses_bad_keys_and_shows_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "shap=A"]) == 2
    assert capsys.readouterr().err.endswith("did you mean shape?\n")
    assert main(["bench", "--cfg", "sparsity=0.97", "debug=true"]) == 0
    assert "sparsity: 0.97  # 0, or" in capsys.readouterr().out
    assert main(["bench", "--help"]) == 0
    assert "contestant: dense-cudnn,dense-flash" in capsys.readouterr().out
    with pytest.raises(Refusal):
        main(["bench", "shap=A", "debug=true"])
