"""The config composes, refuses what it does not know, and builds only this package's classes."""

import inspect
import random
from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gossamer.sparse.construct import allowed_class
from gossamer.sparse.layout import RowMajor, Tiles
from gossamer.train import ranges
from gossamer.train.config import (
    _dotted,
    build,
    compose,
    fingerprint,
    groups,
    recipes,
    require_complete,
    save_config,
)
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

PACKAGES = ("gossamer.sparse.", "gossamer.train.")
OPTIONS = [(group, option) for group, options in groups().items() for option in options]

PAYLOADS = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "subprocess.Popen",
    "subprocess.run",
    "importlib.import_module",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.jit.load",
    "pickle.loads",
    "code.InteractiveInterpreter",
    "trace.Trace",
    "logging.os.system",
    "hydra.utils.instantiate",
    "hydra._internal.instantiate._instantiate2.instantiate",
    "gossamer.train.config.os.system",
    "gossamer.train.config.import_module",
    "gossamer.train.config.build",
    "gossamer.train.config.Path",
    "gossamer.train.codec.torch.load",
    "gossamer.sparse.policies.nn.Module",
    "gossamer.sparse.layout._Static",
    "gossamer.train.model.ScratchWan.__init__.__globals__",
    "gossamer.kernels.blocks.Blocks",
    "gossamer..train.model.ScratchWan",
    "gossamer.train.nowhere.Thing",
    "gossamer.train.__main__.main",
]


def refuse(*overrides: str) -> str:
    with pytest.raises(Refusal) as refusal:
        compose(overrides)
    message = str(refusal.value)
    assert "\n" not in message and ": allowed is " in message and "; " in message
    return message


def write_recipe(folder: Path, text: str) -> str:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text(text)
    return f"recipe='{folder}/recipes/mine.yaml'"


def test_overrides_reach_the_config_and_interpolations_are_resolved() -> None:
    cfg = compose(["sparsity=0.8", "policy.k=0.2", "layout=row_major", "name=run"])
    assert (cfg.sparsity, cfg.policy.k, cfg.layout.q_block) == (0.8, 0.2, 128)
    assert cfg.run_dir == "runs/run"
    assert Path(cfg.model.path).is_absolute() and Path(cfg.model.path).name == "teacher"


def test_every_top_level_key_has_a_comment() -> None:
    conf = Path(inspect.getfile(compose)).parent.parent / "conf"
    for file in sorted(conf.rglob("*.yaml")):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# ") and lines[0].endswith((".", ")", "environment")), file
        if "_target_" in file.read_text():
            keys = [line for line in lines[1:] if not line.startswith("_target_")]
            assert all(" # " in line for line in keys), file


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_composes(recipe: str) -> None:
    assert compose([f"recipe={recipe}"]).recipe_name == recipe


def test_a_recipe_sets_groups_values_and_the_name(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /layout: row_major\npolicy: {k: 0.3}\n"
    cfg = compose([write_recipe(tmp_path, text), "sparsity=0.5"])
    assert (cfg.name, cfg.policy.k, cfg.policy.p, cfg.layout.kv_block) == ("mine", 0.3, 0.0, 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# @package _global_\nsparsiti: 0.7\n", "did you mean sparsity?"),
        ("# @package _global_\noptimizer: {learning: 1}\n", "optimizer.learning=1"),
        ("# Purpose.\n# @package _global_\nsparsity: 0.7\n", "first line `# @package _global_`"),
        ("# @package _global_\n- a\n- b\n", "merge"),
        ("# @package _global_\ndefaults:\n  - override /layout: rowmajor\n", "row_major?"),
        ("# @package _global_\ndefaults:\n  - override /layouts: tiles\n", "layouts"),
        ("# @package _global_\n- a: [\n", "line 3"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refuse(write_recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sparsiti=0.8", "did you mean sparsity?"),
        ("lr=1e-3", "did you mean optimizer.lr?"),
        ("batchsize=2", "did you mean batch_size?"),
        ("policy.kk=1", "did you mean policy.k?"),
        ("+policy.extra=1", "policy.extra=1"),
        ("+anything=1", "anything=1"),
        ("policy=hybird", "did you mean hybrid?"),
        ("recipe=nowhere", "recipe=nowhere"),
        ("recipe=nowhere.yaml", "a folder called recipes"),
        ("sparsity=1.0", "[0, 1)"),
        ("sparsity=-0.1", "[0, 1)"),
        ("sparsity=nan", "[0, 1)"),
        ("sparsity=high", "a number"),
        ("sparsity=null", "either sparsity or error_budget"),
        ("steps=0", "at least 1"),
        ("steps=1.5", "a whole number"),
        ("steps=true", "a whole number"),
        ("batch_size=0", "at least 1"),
        ("optimizer.lr=nan", "above 0"),
        ("optimizer.lr=-1", "above 0"),
        ("optimizer.lr=inf", "above 0"),
        ("optimizer=adam", "did you mean adamw?"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("evaluation.noise_levels=[]", "(0, 1]"),
        ("evaluation.noise_levels=[a]", "a number"),
        ("evaluation.extra=[lpips]", "allowed is some of vmaf, flip"),
        ("repeat_seeds=[1,1]", "different seeds"),
        ("repeat_seeds=[a]", "different seeds"),
        ("seed=-1", "2**32"),
        ("ema=1.0", "[0, 1)"),
        ("device=gpu", "auto, cpu, cuda"),
        ("backend=tritn", "did you mean triton?"),
        ("resume=yes", "auto, force, never"),
        ("export.dtype=bf16", "float32, bfloat16"),
        ("stages=[trian]", "did you mean train?"),
        ("stages=[train,encode]", "in this order"),
        ("stages=[]", "in this order"),
        ("model.condition=last_frame", "first_frame"),
        ("name=../out", "without .."),
        ("name=7", "quote numbers"),
        ("name=${nope}", "nope"),
        ("a=[", "no viable alternative"),
        ("sparsity", "Error parsing"),
        ("=", "++="),
        ("~policy", "another value"),
        ("hydra.run.dir=x", "another value"),
        ("layout@other=tiles", "another value"),
        ("sparsity=0.8,0.9", "gossamer sweep"),
        ("keep_checkpoints=1", "at least 2"),
        ("lora.rank=100000000000000000000", "below 2**31"),
        ("data.max_clips=inf", "null or a whole number of at least 1"),
        ("data.fps=true", "null or a finite number above 0"),
        ("calibration.path=7", "null or a text"),
        ("training_data.dir=[a]", "null or a text"),
        ("data.source=7", "data.source=7: allowed is a text"),
    ],
)
def test_bad_input_is_refused_in_one_line(override: str, said: str) -> None:
    assert said in refuse(override)


def test_a_key_that_may_be_null_has_a_rule_of_its_own() -> None:
    """Its default says no type. Those of the sparse parts are checked by their constructors."""
    conf = Path(str(files("gossamer.conf")))
    sparse = {"layout", "estimator", "policy", "compensation", "allocation"}
    found = set()
    for file in conf.rglob("*.yaml"):
        group = "" if file.parent == conf else f"{file.parent.name}."
        content = OmegaConf.load(file)
        keys = _dotted(OmegaConf.to_container(content))
        found |= {group + key for key in keys if OmegaConf.select(content, key) is None}
    found = {key for key in found if key.partition(".")[0] not in sparse}
    assert "calibration.path" in found and found <= ranges._RANGES.keys() | ranges._CHOICES.keys()


@pytest.mark.parametrize("key", ["data=encoded data.dir", "model=pretrained model.path"])
def test_null_is_no_value_of_a_key_that_must_be_given(key: str) -> None:
    *group, name = key.split()
    with pytest.raises(Refusal, match=f"{name}=null: allowed is a value; give {name}="):
        compose([*group, f"{name}=null"])


def test_every_extra_measure_may_be_asked_for() -> None:
    assert list(compose(["evaluation.extra=[vmaf,flip]"]).evaluation.extra) == ["vmaf", "flip"]


def test_random_typing_composes_or_is_refused() -> None:
    draw = random.Random(0)
    keys = ["sparsity", "steps", "policy", "optimizer.lr", "stages", "model", "x", "name", "data"]
    values = [
        "",
        "nan",
        "{a:1}",
        "[1,[2]]",
        "'q",
        "a:b",
        "${x",
        "~",
        "1e999",
        "0x1",
        "-",
        "é",
        "\\",
    ]
    for _ in range(40):
        override = f"{draw.choice(['', '+', '++'])}{draw.choice(keys)}={draw.choice(values)}"
        try:
            compose([override])
        except Refusal as refusal:
            assert "\n" not in str(refusal)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_builds_with_its_constructors_arguments(group: str, option: str) -> None:
    node = compose([f"{group}={option}"])[group]
    arguments = OmegaConf.to_container(node)
    if target := arguments.pop("_target_", None):
        inspect.signature(allowed_class(target, PACKAGES)).bind(**arguments)
    if not OmegaConf.missing_keys(node) and option not in ("wandb", "tensorboard"):
        assert build(node) is not None


def test_build_makes_inner_objects_first_and_adds_arguments() -> None:
    built = build(
        {
            "rows": {"_target_": "gossamer.sparse.layout.RowMajor", "q_block": 32},
            "parts": [{"_target_": "gossamer.sparse.layout.Tiles"}, 1, "a"],
        },
        other=Tiles,
    )
    assert isinstance(built["rows"], RowMajor) and built["rows"].block_shape == (32, 64)
    assert isinstance(built["parts"][0], Tiles) and built["parts"][1:] == [1, "a"]
    assert built["other"] is Tiles
    assert build(compose(["noise=shifted"]).noise, shift=5.0).shift == 5.0


@pytest.mark.parametrize("target", PAYLOADS)
def test_foreign_targets_are_refused_and_never_run(target: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    node = {"_target_": target, "command": f"touch {marker}"}
    for nested in (node, {"inner": [node]}):
        with pytest.raises(Refusal, match="_target_"):
            build(nested)
    assert not marker.exists()


def test_a_target_given_on_the_command_line_is_refused_when_it_is_built(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    cfg = compose([f"policy={{_target_: os.system, command: 'touch {marker}'}}"])
    with pytest.raises(Refusal, match=r"policy\._target_=os\.system"):
        build(cfg.policy)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_"])
def test_hydras_special_keys_are_refused(key: str) -> None:
    with pytest.raises(Refusal, match=key):
        build({"_target_": "gossamer.sparse.layout.Tiles", key: True})


def test_a_constructors_error_names_the_config_path() -> None:
    with pytest.raises(Refusal, match=r"^noise=.*shift=-1"):
        build(compose(["noise=shifted", "noise.shift=-1"]).noise)
    with pytest.raises(Refusal, match=r"^noise\.shif=1: .*did you mean shift\?"):
        build(OmegaConf.create({"noise": {**compose(["noise=shifted"]).noise, "shif": 1}}).noise)


def test_a_missing_value_is_refused_with_its_path() -> None:
    cfg = compose(["model=pretrained"])
    with pytest.raises(Refusal, match=r"model\.path=\?\?\?"):
        require_complete(cfg)
    with pytest.raises(Refusal, match=r"model\.path=\?\?\?"):
        build(cfg.model)


def test_the_fingerprint_follows_the_values_and_not_their_order_or_secrets() -> None:
    same = [compose(["seed=1", "steps=2"]), compose(["steps=2", "seed=1"])]
    assert fingerprint(same[0]) == fingerprint(same[1]) != fingerprint(compose(["seed=2"]))
    keys = ["policy", "optimizer.lr"]
    assert fingerprint(same[0], keys) == fingerprint(compose(["seed=2"]), keys)
    assert fingerprint(same[0], keys) != fingerprint(compose(["optimizer.lr=1e-3"]), keys)


def test_the_saved_config_is_whole_resolved_and_free_of_secrets(tmp_path: Path) -> None:
    cfg = compose(["name=run"])
    OmegaConf.set_struct(cfg, False)
    cfg.hub = {"api_key": "hf_planted", "url": "https://me:hf_planted@host/x?token=hf_planted"}
    save_config(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_planted" not in text and "${" not in text and "@host/x" in text
    assert OmegaConf.create(text).run_dir == "runs/run"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_redaction_finds_nested_secrets_and_leaves_ordinary_words() -> None:
    secrets = {"hf_token": "s", "AWSSecretKey": "s", "deep": [{"passwords": {"a": ["s"]}}]}
    assert "'s'" not in repr(redact(secrets))
    ordinary = {"use_cls_token": True, "max_tokens": 3, "tokenizer": "t"}
    assert redact(ordinary) == ordinary


def test_the_nearest_word_prefers_the_same_last_part() -> None:
    known = ["optimizer.lr", "layout.block", "batch_size"]
    assert nearest("lr", known) == "did you mean optimizer.lr?"
    assert nearest("bathc_size", known) == "did you mean batch_size?"
    assert nearest("zzz", known) == ""
