"""The command line: verbs reach their functions, bad input is one line and exit code 2."""

import logging
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest
import yaml
from omegaconf import DictConfig

from gossamer.train.cli import VERBS, main
from gossamer.train.refusal import Refusal

STAGES = ["encode", "calibrate", "train", "evaluate", "export", "report"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, DictConfig, list[str]]]:
    """Record what the verbs would run."""
    made: list[tuple[str, DictConfig, list[str]]] = []
    run, check = ModuleType("gossamer.train.run"), ModuleType("gossamer.train.check")
    run.run = lambda cfg, stages: made.append(("run", cfg, stages))  # type: ignore[attr-defined]
    check.check = lambda cfg: made.append(("check", cfg, []))  # type: ignore[attr-defined]
    for module in (run, check):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(f"gossamer.train.{module.__name__[15:]}", module, raising=False)
    return made


@pytest.mark.parametrize("verb", ["encode", "calibrate", "evaluate", "report", "export"])
def test_a_stage_verb_runs_that_stage(verb: str, calls: list) -> None:
    assert main([verb, "sparsity=0.7"]) == 0
    ((kind, cfg, stages),) = calls
    assert (kind, cfg.sparsity, stages) == ("run", 0.7, [verb])


def test_train_runs_the_stages_of_the_config(calls: list) -> None:
    assert main(["train"]) == 0 and main(["train", "stages=[train,report]"]) == 0
    assert [stages for _, _, stages in calls] == [STAGES, ["train", "report"]]


def test_check_only_checks(calls: list) -> None:
    assert main(["check", "name=x"]) == 0
    assert [(kind, cfg.name) for kind, cfg, _ in calls] == [("check", "x")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "did you mean train?"),
        (["sparsity=0.8"], "write gossamer VERB"),
        (["train", "--cgf"], "did you mean --cfg?"),
        (["train", "sparsity=2"], "[0, 1)"),
        (["train", "model=pretrained"], "give model.path=... on the command line"),
        (["sweep", "sparsity=0.8"], "a=1,2"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], said: str, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and not calls
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.err.count("\n") == 1


def test_debug_shows_where_a_refusal_came_from(calls: list) -> None:
    with pytest.raises(Refusal):
        main(["train", "sparsity=2", "debug=true"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    def interrupted(cfg: DictConfig, stages: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["gossamer.train.run"], "run", interrupted)
    assert main(["train"]) == 130


def test_sigterm_exits_with_143_and_one_line(
    monkeypatch: pytest.MonkeyPatch, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(cfg: DictConfig, stages: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules["gossamer.train.run"], "run", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["encode"]) == 143
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_names_every_verb_and_the_verbs_own_names_the_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        own = "block: 64x64" if verb == "bench" else "compensation  centroid, drop"
        assert own in capsys.readouterr().out


def test_cfg_prints_every_key_with_its_meaning(
    calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--cfg", "sparsity=0.7", "layout=row_major"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["layout"]["kv_block"] == 64 and not calls
    assert "sparsity: 0.7  # share of query-key pairs" in text
    assert "  lr: 0.0001  # peak learning rate" in text
    assert "  kv_block: 64  # key tokens per block" in text
    bare = [line for line in text.splitlines() if " # " not in line and "_target_" not in line]
    assert all(line.endswith(":") for line in bare), bare


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gossamer ")


def test_only_the_first_process_logs_below_warnings(
    monkeypatch: pytest.MonkeyPatch, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("gossamer")
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        logger.handlers = []
        main(["check"])
        logging.getLogger("gossamer.train.somewhere").info("a message")
        assert ("a message" in capsys.readouterr().err) is said


def test_help_starts_without_torch_or_hydra() -> None:
    code = (
        "import sys; from gossamer.train.cli import main; main(['--help']);"
        "assert not {'torch', 'hydra', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_module_is_the_verb_train() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gossamer.train", "sparsity=2"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: sparsity=2") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("own", "then"), [(None, "AUTO"), ("AVX2", "AVX2")])
def test_mkl_rounds_alike_wherever_tensors_lie_unless_the_user_says_otherwise(
    own: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if own:
        monkeypatch.setenv("MKL_CBWR", own)
    main(["--help"])
    assert os.environ["MKL_CBWR"] == then
