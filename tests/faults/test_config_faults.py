"""Configuration and security faults, C1 to C4 of the catalogue (shared/spec/reliability.md, 4.7).

Elsewhere, and not repeated here: tests/train/test_config.py (48 wrong overrides with what each
refusal says; payloads given to `build`, special keys of Hydra; redaction).
"""

import io
import json
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file

from gossamer.sparse.attach import attach, load_policy, method_from_spec, save_policy
from gossamer.train import checkpoint
from gossamer.train.calibration import Calibration
from gossamer.train.cli import main
from gossamer.train.codec import PCACodec, load_codec
from gossamer.train.config import build, compose, groups, recipes
from gossamer.train.data.dataset import LatentDataset
from gossamer.train.data.encode import encode
from gossamer.train.model import Pretrained, ScratchWan
from gossamer.train.optimizer_state import optimizer_tensors
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords
from gossamer.train.velocities import VelocityCache

# C1: fuzzed overrides

WRONG = {
    bool: ["3", "yes please", "[true]", "null", "1.5"],
    int: ["1.5", "many", "[1]", "{a: 1}", "true", "null", "-1", "nan"],
    float: ["high", "[0.1]", "{a: 1}", "true", "null", "nan", "-.inf"],
    str: ["7", "[a]", "{a: b}", "true"],
    list: ["7", "word", "{a: 1}", "null", "true"],
}
BUILT = ("policy.", "noise", "layout.", "data.dir", "teacher")
FREE = ("sparsity", "optimizer.clip", "guidance.scale")  # that may be null, .inf or negative


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield prefix + name, value


def typo(word: str, draw: random.Random) -> str:
    """Leave out, double or swap a letter of the last part, not the first two."""
    head, dot, leaf = word.rpartition(".")
    place = draw.randrange(2, len(leaf) - 1)
    changed = draw.choice(
        [
            leaf[:place] + leaf[place + 1 :],
            leaf[:place] + leaf[place] + leaf[place:],
            leaf[: place - 1] + leaf[place] + leaf[place - 1] + leaf[place + 1 :],
        ]
    )
    return head + dot + (changed if changed != leaf else leaf + "x")


def wrong_overrides(count: int) -> dict[str, str]:
    """Return different overrides that no run may accept, with what the refusal must mention."""
    draw = random.Random(0)
    values = dict(leaves(OmegaConf.to_container(compose([]))))
    keys = [key for key, value in values.items() if type(value) in WRONG and key not in FREE]
    long = [key for key in keys if len(key.rpartition(".")[2]) > 4]
    options = [(g, o) for g, names in groups().items() for o in names if len(o) > 4]
    special = [
        "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.lr=0", "steps=0", "steps=-3",
        "batch_size=0", "batch_size=1e9", "layout.block=7", "layout.block=[0,2,2]", "seed=-1",
        "layout.block=[2,2]", "sparsity=1", "sparsity=-0.5", "ema=1", "policy.k=2", "policy.p=-1",
        "recipe=nothing", "model=nothing", "data.frames=0", "keep_checkpoints=0", "data.buckets=[]",
        "data.window=0", "data.cache_gb=0", "data.cache_gb=nan", "noise=shifted  noise.shift=0",
        "data.dir=nosuch://place", "data.fps=-1", "calibration.probes=0", "resume=maybe",
        "stages=[train,encode]", "teacher=cached", "lora.rank=-1", "evaluation.noise_levels=[2]",
    ]  # fmt: skip
    syntax = ["a=[", "=", "x={", "~steps", "steps=1,2", "hydra.run.dir=x", "a.b.c", "'", "steps==["]
    wrong = dict.fromkeys(syntax, "")
    for override in special:
        # what is judged when it is built takes a model and data that fit
        recipe = "recipe=demo  " if override.startswith(BUILT) else ""
        wrong[recipe + override] = override.split()[-1].partition("=")[0].split(".")[-1]
    number = 0
    while len(wrong) < count:
        match number % 3:
            case 0:
                key = draw.choice(keys)
                value = draw.choice(WRONG[type(values[key])])
                recipe = "recipe=demo  " if key.startswith(BUILT) else ""
                wrong[f"{recipe}{key}={value}"] = key.split(".")[-1]
            case 1:
                key = draw.choice(long)
                wrong[f"{typo(key, draw)}=1"] = f"did you mean {key}?"
            case _:
                group, option = draw.choice(options)
                wrong[f"{group}={typo(option, draw)}"] = f"did you mean {option}?"
        number += 1
    return wrong


def test_c1_fuzzed_overrides_are_refused_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hundred commands, each with exit code 2 and one line that names the key or the nearest."""
    odd = []
    for override, said in wrong_overrides(100).items():
        code = main(["check", *override.split("  ")])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        clean = "Traceback" not in shown.err and len(lines) == 1 and "; " in lines[0]
        if code != 2 or not clean or said not in lines[0]:
            odd.append((override, said, code, shown.err[-300:]))
    assert odd == []


# C2: injected targets


class Touch:
    """Unpickled, it makes a file: the mark that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-ran"


@pytest.fixture
def evil(tmp_path: Path, marker: Path) -> Path:
    """A pickle that makes the marker."""
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Touch(marker)))
    return path


def payloads(marker: Path, evil: Path) -> dict[str, dict[str, Any]]:
    """25 targets with the arguments that would make the marker, or read the pickle."""
    shell, code = f"mkdir {marker}", f"__import__('os').mkdir({str(marker)!r})"
    file, folder = str(evil), str(marker.parent / "hub")
    return {
        "os.system": {"command": shell},
        "posix.system": {"command": shell},
        "os.mkdir": {"path": str(marker)},
        "os.makedirs": {"name": str(marker)},
        "builtins.eval": {"_args_": [code]},
        "builtins.exec": {"_args_": [code]},
        "builtins.getattr": {"_args_": ["os", "system"]},
        "subprocess.run": {"args": shell, "shell": True},
        "subprocess.Popen": {"args": shell, "shell": True},
        "subprocess.check_call": {"_args_": [["mkdir", str(marker)]]},
        "logging.os.system": {"command": shell},
        "pathlib.os.mkdir": {"path": str(marker)},
        "shutil.os.makedirs": {"name": str(marker)},
        "importlib.import_module": {"name": "os"},
        "pickle.load": {"_args_": [file]},
        "torch.load": {"f": file, "weights_only": False},
        "torch.serialization.load": {"f": file, "weights_only": False},
        "torch.hub.load": {"repo_or_dir": folder, "model": "run", "source": "local"},
        "torch.utils.cpp_extension.load_inline": {"name": "x", "cpp_sources": ["int x;"]},
        "numpy.load": {"file": file, "allow_pickle": True},
        "code.InteractiveInterpreter": {},
        "gossamer.train.config.Path.mkdir": {"_args_": [str(marker)]},
        "gossamer.train.run_lock.os.mkdir": {"path": str(marker)},
        "gossamer.train.codec.torch.load": {"f": file, "weights_only": False},
        "gossamer.sparse.construct.import_module": {"name": "os"},
    }


@pytest.fixture
def targets(marker: Path, evil: Path) -> dict[str, dict[str, Any]]:
    hub = marker.parent / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(f"import os\ndef run():\n    os.mkdir({str(marker)!r})\n")
    found = payloads(marker, evil)
    assert len(found) == 25
    return found


def node(target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def by_override(target: str, arguments: dict[str, Any], folder: Path) -> None:
    text = json.dumps(node(target, arguments)).replace('"_', "_").replace('_":', "_:")
    text = re.sub(r'"(\w+)":', r"\1:", text)
    build(compose([f"policy={text}"]).policy)


def by_recipe(target: str, arguments: dict[str, Any], folder: Path) -> None:
    recipe = folder / "recipes" / "mine.yaml"
    recipe.parent.mkdir(exist_ok=True)
    body = OmegaConf.to_yaml(OmegaConf.create({"estimator": node(target, arguments)}))
    recipe.write_text(f"# @package _global_\n{body}")
    build(compose([f"recipe='{recipe}'"]).estimator)


def by_exported_policy(target: str, arguments: dict[str, Any], folder: Path) -> None:
    method = {
        "layout": {"_target_": "gossamer.sparse.layout.Tiles"},
        "estimator": node(target, arguments),
        "policy": {"_target_": "gossamer.sparse.policies.Hybrid"},
        "compensation": {"_target_": "gossamer.sparse.compensation.Drop"},
    }
    save_policy(folder / "export", {"method": method}, {"x": torch.ones(1)})
    load_policy(folder / "export")


def by_sweep(target: str, arguments: dict[str, Any], folder: Path) -> None:
    code = main(["sweep", f"policy._target_={target}", "device=cpu", f"runs_dir={folder}/runs"])
    assert code == 2
    raise Refusal("sweep", code, "nothing of this", "it was refused")


CONTROLS = ["os.system", "os.mkdir", "subprocess.run", "torch.load", "torch.hub.load"]
WAYS = {f.__name__: f for f in (by_override, by_recipe, by_exported_policy, by_sweep)}


@pytest.mark.parametrize("way", WAYS)
def test_c2_no_payload_runs_however_it_is_given(
    way: str, targets: dict[str, dict[str, Any]], marker: Path, tmp_path: Path
) -> None:
    for target, arguments in targets.items():
        with pytest.raises(ValueError, match=r"_target_|config=|arguments|sweep=|allowed is"):
            WAYS[way](target, arguments, tmp_path)
        assert not marker.exists(), target


def test_c2_control_without_the_allow_list_payloads_run(
    targets: dict[str, dict[str, Any]], marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's own `instantiate` runs some of them, and our `construct` would run most."""
    from gossamer.sparse import construct as construct_module

    def anything(target: object, packages: object, path: str = "") -> Any:
        return hydra.utils.get_object(str(target))

    ran: dict[str, set[str]] = {"hydra": set(), "ours": set()}
    monkeypatch.setattr(construct_module, "allowed_class", anything)
    for target in CONTROLS:
        arguments = targets[target]
        plain = {k: v for k, v in arguments.items() if k != "_args_"}
        for name, run in (
            ("hydra", lambda t=target, a=arguments: hydra.utils.instantiate(node(t, a))),
            ("ours", lambda t=target, a=plain: construct_module.construct(node(t, a))),
        ):
            with suppress(Exception):  # refused by Hydra, or the payload's own after it ran
                run()
            if marker.exists():
                marker.rmdir()
                ran[name].add(target)
    assert {"torch.load", "torch.hub.load"} <= ran["hydra"]
    assert set(CONTROLS) - {"torch.hub.load"} <= ran["ours"]


# C3: pickles in place of files


def write_checkpoint(folder: Path) -> Path:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, state = optimizer_tensors(optimizer, model.named_parameters())
    groups = {"model": model.state_dict(), "optimizer": tensors, "ema": model.state_dict()}
    path = checkpoint.save(folder, 3, tensors=groups, state={"optimizer": state}, keep=2)
    assert path is not None
    return path


def whole_manifest(folder: Path) -> None:
    """Sign the folder's files anew, as an attacker would."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    files = {
        path.name: {"sha256": checkpoint.sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != checkpoint.MANIFEST
    }
    text = checkpoint._manifest_text(
        {k: manifest[k] for k in ("format", "step")} | {"files": files}
    )
    (folder / checkpoint.MANIFEST).write_text(text)


FOREIGN = ["random_states_0.pkl", "custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin",
           "pytorch_model.bin", "model.pt", "training_args.bin", "model.ckpt"]  # fmt: skip
OWN = ["state.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
       "ema.safetensors"]  # fmt: skip


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", [*OWN, *FOREIGN])
def test_c3_no_file_of_a_checkpoint_is_unpickled(
    name: str, signed: bool, evil: Path, marker: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    step = write_checkpoint(folder)
    shutil.copy(evil, step / name)
    if signed and name != checkpoint.MANIFEST:
        whole_manifest(step)
    newest = checkpoint.latest(folder)
    if name in FOREIGN:
        assert newest == step and set(checkpoint.load(step)[0]) == {"model", "optimizer", "ema"}
    else:
        assert newest == (step if signed and name != checkpoint.MANIFEST else None)
        with pytest.raises(Refusal, match=name):
            checkpoint.load(step)
    assert not marker.exists()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable]]:
    """Whatever else a run reads back: kind -> its folder, and how it is read."""
    root = tmp_path_factory.mktemp("artefacts")
    source = ScratchWan(num_layers=1, num_heads=1, head_dim=12, ffn_dim=8, channels=4, text_dim=8)
    model = source.load(0)
    model.save_pretrained(root / "model")
    cfg = compose(["backend=reference"])
    names = ["layout", "estimator", "policy", "compensation", "backend"]
    method = OmegaConf.to_container(OmegaConf.masked_copy(cfg, names))
    attach(model, method_from_spec(method))
    save_policy(root / "policy", {"method": method}, {"x": torch.ones(1)})
    video = root / "film.mp4"
    write_video(video)
    encode(
        video, root / "data", codec=PCACodec(channels=4), text=HashedWords(dim=8, length=2),
        height=32, width=32, frames=4, holdout=0.0,
    )  # fmt: skip
    (root / "velocities").mkdir()
    save_file({"0": torch.ones(1, 1)}, root / "velocities" / "clips-0-1.safetensors")
    digest = checkpoint.sha256(root / "velocities" / "clips-0-1.safetensors")
    values = {
        "request": {}, "precision": "no", "clips": 1, "files": {"clips-0-1.safetensors": digest},
        "dtype": "bfloat16", "format_version": 1,
    }  # fmt: skip
    (root / "velocities" / "velocities.json").write_text(json.dumps(values))
    (root / "calibration").mkdir()
    (root / "calibration" / "calibration.json").write_text("{}")

    def read_data(folder: Path) -> None:
        for index in range(len(data := LatentDataset(folder, "train"))):
            assert data[index]

    return {
        "model": (root / "model", lambda p: Pretrained(path=str(p)).load(0)),
        "policy": (root / "policy", load_policy),
        "data": (root / "data", read_data),
        "codec": (root / "data" / "codec", load_codec),
        "velocities": (root / "velocities", lambda p: VelocityCache.open(p).read([0], [0])),
        "calibration": (root / "calibration", Calibration.load),
    }


def write_video(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for index in range(4):
            pixels = np.full((32, 32, 3), 60, np.uint8)
            pixels[:8, 4 * index : 4 * index + 8] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["model", "policy", "data", "codec", "velocities", "calibration"])
def test_c3_no_other_file_that_is_read_back_is_unpickled(
    kind: str, artefacts: dict[str, tuple[Path, Callable]], evil: Path, marker: Path, tmp_path: Path
) -> None:
    """Each file in turn is a pickle, and the pickles that other tools read lie beside it."""
    folder, read = artefacts[kind]
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    beside = ["diffusion_pytorch_model.bin", "pytorch_model.bin", "pca.pt", "adapter_model.bin"]
    for name in [*names, *beside]:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        shutil.copy(evil, copy / name)
        if name == "diffusion_pytorch_model.bin" and kind == "model":
            (copy / "diffusion_pytorch_model.safetensors").unlink()
        try:
            read(copy)
        except ValueError as error:
            assert "\n" not in str(error) or kind == "model", (name, error)
        except (FileNotFoundError, SafetensorError):
            assert name not in beside, name
        assert not marker.exists(), name
        shutil.rmtree(copy)


def test_c3_control_the_pickle_runs_where_pickles_are_read(evil: Path, marker: Path) -> None:
    with pytest.raises(Exception, match="weights_only"):
        torch.load(evil)
    assert not marker.exists()
    with pytest.raises(RuntimeError):  # no checkpoint at all: but by then it has run
        torch.load(evil, weights_only=False)
    assert marker.exists()


# C4: secrets

SECRETS = [f"planted-secret-{number}" for number in range(10)]
OVERRIDES = [
    f"data.dir=memory://me:{SECRETS[0]}@bucket/data",
    f"data.dir=memory://bucket/data?token={SECRETS[1]}",
    f"+tracker.api_key={SECRETS[2]}",
    f"+tracker.settings.hf_token={SECRETS[3]}",
    f"data.source=https://user:{SECRETS[4]}@host/film.mp4",
    f"+model.credentials={{password: {SECRETS[5]}}}",
    f"model.path=https://hub/?secret={SECRETS[6]}",
]
ENVIRONMENT = {
    "WANDB_API_KEY": SECRETS[7],
    "HF_TOKEN": SECRETS[8],
    "AWS_SECRET_ACCESS_KEY": SECRETS[9],
}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """All that stdout, stderr and every logger say."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    logging.getLogger("gossamer").addHandler(handler)

    def text() -> str:
        shown = capsys.readouterr()
        return shown.out + shown.err + stream.getvalue()

    yield text
    logging.getLogger().removeHandler(handler)
    logging.getLogger("gossamer").removeHandler(handler)


def test_c4_no_planted_secret_is_written_or_said(
    said: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands with secrets in them, refused or not: what they say and leave holds none."""
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    write_video(tmp_path / "film.mp4")
    data = ["data=video", f"data.source={tmp_path}/film.mp4", "data.height=32", "data.width=32"]
    data += ["data.frames=4", "data.holdout=0", "codec.channels=4", "device=cpu"]
    codes = []
    for override in OVERRIDES:
        for verb in (["check"], ["encode"], ["train", "--cfg"]):
            codes.append(main([*verb, *data, override]))
            codes.append(main([*verb, "debug=false", override, "name=again"]))
    text = said()
    found = [secret for secret in SECRETS if secret in text]
    for path in tmp_path.rglob("*"):
        found += [s for s in SECRETS if s in str(path)]
        if path.is_file():
            found += [s for s in SECRETS if s.encode() in path.read_bytes()]
    assert found == []
    assert {0, 2} == set(codes) and "redacted" in text


def test_c4_control_without_redaction_they_are_found() -> None:
    url = OVERRIDES[0].partition("=")[2]
    assert SECRETS[0] in repr(url) and SECRETS[0] not in repr(redact(url))
    plain = {"tracker": {"settings": {"hf_token": SECRETS[3]}}}
    assert SECRETS[3] in OmegaConf.to_yaml(plain) and SECRETS[3] not in repr(redact(plain))


def test_every_recipe_and_option_is_free_of_targets_outside_the_package() -> None:
    for recipe in recipes():
        for key, value in leaves_with_targets(compose([f"recipe={recipe}"])):
            assert value.startswith(("gossamer.sparse.", "gossamer.train.")), (recipe, key)


def leaves_with_targets(cfg: Any) -> Iterator[tuple[str, str]]:
    def walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for name, child in value.items():
                if name == "_target_":
                    yield key, child
                yield from walk(child, f"{key}.{name}")

    yield from walk(OmegaConf.to_container(cfg), "")
