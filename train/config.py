"""Compose the configuration with Hydra, check it, build only this package's classes from it.

Hydra composes and never instantiates: its `instantiate` can run any code that a file names
(`torch.load`, `load_inline`), so `build` has a positive allow-list of its own.
"""

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from gossamer.sparse.construct import allowed_class, construct
from gossamer.train.files import write_atomic
from gossamer.train.ranges import NULLABLE, validate
from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

_RECIPE_HEADER = "# @package _global_"
_PACKAGES = ("gossamer.sparse.", "gossamer.train.")
_READING = ("dir", "cache", "cache_gb", "window")  # keys of data that decide no row
_URL = re.compile(r"[A-Za-z][\w+.-]*://")


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/config.yaml with a recipe and overrides; refuse what it does not know or allow.

    Returns a resolved config; values that must still be given stay `???`.
    """
    OmegaConf.register_new_resolver("asset", _asset, replace=True)
    OmegaConf.register_new_resolver("density", _density, replace=True)
    arguments = _hydra_arguments(parse_overrides(overrides))
    cfg, choices = _compose_with_hydra(arguments)
    values = _container(cfg)
    _check_against(_schema(*(f"{group}={choices[group]}" for group in groups())), values)
    composed = OmegaConf.create(values)
    OmegaConf.set_struct(composed, True)
    validate(composed)
    return composed


def build(node: Any, **extra: Any) -> Any:
    """Construct the class that `_target_` names, children first; `extra` adds arguments."""
    where = node._get_full_key(None) if OmegaConf.is_config(node) else ""
    arguments = _container(node)
    target = arguments.get("_target_")
    try:
        _check_node(arguments, where)
        return construct({**arguments, **extra}, packages=_PACKAGES, path=where)
    except Refusal:
        raise
    except ModuleNotFoundError as error:
        fix = f"pip install {error.name}"
        raise Refusal(where, target, "a class whose packages are installed", fix) from error
    except ValueError as error:
        if isinstance(error.__cause__, Refusal):
            raise error.__cause__ from error
        raise Refusal(where, target, "what its constructor accepts", str(error)) from error


def require_complete(cfg: DictConfig) -> None:
    """Refuse a config in which a value that must be given is still `???`."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise Refusal(key, "???", "a value", f"give {key}=... on the command line")


def groups() -> dict[str, list[str]]:
    """List the options of each config group, from the folders of conf/."""
    folders = (entry for entry in files("gossamer.conf").iterdir() if entry.is_dir())
    return {
        folder.name: options
        for folder in sorted(folders, key=lambda entry: entry.name)
        if (options := _yaml_names(folder.iterdir()))
    }


def recipes() -> list[str]:
    """List the recipes that come with the package."""
    return _yaml_names(files("gossamer.recipes").iterdir())


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse `key=value` arguments with Hydra's grammar; `recipe=NAME` becomes `+recipes=NAME`."""
    lines = [re.sub(r"^recipe=", "+recipes=", line) for line in overrides]
    try:
        with initialize_config_module("gossamer.conf", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()  # for glob(...) over a group's options
        return OverridesParser.create(loader).parse_overrides(lines)
    except OverrideParseException as error:
        reason = error.message.splitlines()[0]
        raise Refusal(
            "override", error.override, "key=value", f"{reason}; quote special characters"
        ) from error


def fingerprint(cfg: DictConfig, keys: Sequence[str] | None = None) -> str:
    """Hash the resolved config, or only some (dotted) keys of it; secrets do not count."""
    chosen = cfg if keys is None else {key: OmegaConf.select(cfg, key) for key in sorted(keys)}
    text = json.dumps(redact(_container(chosen)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def data_dir(cfg: DictConfig) -> Path:
    """Return where the encoded shards lie: data.dir, or a folder named by what decides them.

    Of a URL it is the folder of data.cache that keeps what is fetched.
    """
    url = data_url(cfg)
    if url is not None:
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        return Path(cfg.data.cache) / f"{url.rpartition('/')[2]}-{digest}"
    if cfg.data.dir is not None:
        return Path(cfg.data.dir)
    stem = Path(str(cfg.data.source)).stem
    keys = [f"data.{name}" for name in cfg.data if name not in _READING]
    return Path("data") / f"{stem}-{fingerprint(cfg, [*keys, 'codec', 'text'])[:8]}"


def data_url(cfg: DictConfig) -> str | None:
    """Return data.dir where it is a URL."""
    place = str(cfg.data.dir).rstrip("/")
    return place if _URL.match(place) else None


def encode_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys of data that `encode` takes beside the source."""
    settings = _container(cfg.data)
    return {k: v for k, v in settings.items() if k != "source" and k not in _READING}


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Write the config resolved and redacted; the file appears whole or not at all."""
    write_atomic(Path(path), OmegaConf.to_yaml(OmegaConf.create(redact(_container(cfg)))))


def _density(sparsity: float) -> float:
    """Return the share of token pairs that is left, for a policy that is given it directly."""
    return round(1 - sparsity, 9)


def _asset(path: str) -> str:
    return str((Path(str(files("gossamer.recipes"))) / path).resolve())


def _yaml_names(entries: Iterable[Any]) -> list[str]:
    return sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def _hydra_arguments(overrides: Sequence[Override]) -> list[str]:
    """Sort overrides into recipe, groups and values; values are forced in and checked later."""
    known = groups()
    arguments = []
    for override in overrides:
        key, line = override.key_or_group, str(override.input_line)
        if override.is_delete() or override.package is not None or override.is_hydra_override():
            raise Refusal("override", line, "key=value", "give the key another value instead")
        if override.is_sweep_override():
            raise Refusal(key, line.partition("=")[2], "one value", "use gossamer sweep for more")
        value = override.value()
        if key == "recipes":
            arguments += _recipe_arguments(str(value))
        elif key in known and not isinstance(value, dict):
            _check_option(key, value, known[key])
            arguments.append(f"{key}={value}")
        else:
            arguments.append(f"++{key}={override.get_value_string()}")
    return arguments


def _recipe_arguments(recipe: str) -> list[str]:
    """Name a recipe of the package, or one of the user's own: FOLDER/recipes/NAME.yaml."""
    path, search = Path(recipe), []
    if path.suffix == ".yaml":
        path = path.absolute()
        if not path.is_file() or path.parent.name != "recipes":
            allowed = "a name, or an existing file in a folder called recipes"
            raise Refusal("recipe", recipe, allowed, "correct the path or move the file there")
        search = [f"hydra.searchpath=['file://{path.parent.parent}','pkg://gossamer']"]
    else:
        _check_option("recipe", recipe, recipes())
        path = Path(str(files("gossamer.recipes"))) / f"{recipe}.yaml"
    if not path.read_text(encoding="utf-8").startswith(_RECIPE_HEADER):
        raise Refusal("recipe", path, f"a file with the first line `{_RECIPE_HEADER}`", "add it")
    return [*search, f"+recipes='{path.stem}'", f"++recipe_name='{path.stem}'"]


def _check_option(field: str, value: Any, options: Sequence[str]) -> None:
    if value not in options:
        fix = nearest(str(value), options) or f"give {field}=NAME"
        raise Refusal(field, value, ", ".join(options) or "nothing yet", fix)


def _compose_with_hydra(arguments: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    try:
        with initialize_config_module("gossamer.conf", version_base="1.3"):
            cfg = hydra_compose("config", overrides=arguments, return_hydra_config=True)
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        fix = nearest(option, error.options or []) or "mend the defaults list of the recipe"
        raise Refusal(group, option, ", ".join(error.options or ["-"]), fix) from error
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        given = [line.lstrip("+") for line in arguments if not line.startswith("hydra.")]
        raise Refusal("config", " ".join(given), "what composes", str(error)) from error
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    if "recipes" in cfg:  # a group that is not found becomes a plain value, silently
        raise Refusal("recipe", cfg.recipe_name, "a mapping of config keys", "mend the file")
    return cfg, choices


@cache
def _schema(*chosen: str) -> dict[str, Any]:
    """Return what the package's own files say for these options: the known keys and their types."""
    return _container(_compose_with_hydra(list(chosen))[0])


def _container(cfg: Any) -> Any:
    try:
        cfg = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg)
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except InterpolationToMissingValueError as error:
        return _container(_named(cfg, str(error.full_key)))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise Refusal(str(error.full_key), "${...}", "a key of the config", reason) from error


def _named(cfg: Any, key: str) -> Any:
    """Return cfg with `key`, which refers to a value still to be given, as text: <model.path>."""
    copied = copy.deepcopy(cfg)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(copied, parent) if parent else copied
    text = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[call-overload, index]
    node[name] = text.replace("${", "<").replace("}", ">")
    return copied


def _check_against(schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse keys and types that neither conf/config.yaml nor the chosen options have."""
    known = list(_dotted(schema))

    def check(expected: Any, value: Any, key: str) -> None:
        if not isinstance(expected, dict):
            _check_type(expected, value, key)
        elif not isinstance(value, dict):
            raise Refusal(key, value, f"the keys {', '.join(expected)}", f"set {key}.KEY=value")
        elif expected.get("_target_") == value.get("_target_"):
            for name, child in value.items():
                dotted = f"{key}.{name}".lstrip(".")
                if name not in expected:
                    fix = nearest(dotted, known) or "gossamer train --cfg lists all keys"
                    shown = redact({name: child})[name]
                    raise Refusal(dotted, shown, "a key of the config", fix)
                check(expected[name], child, dotted)

    check(schema, values, "")


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")


def _check_type(expected: Any, value: Any, key: str) -> None:
    allowed: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "a text (quote numbers: \"'7'\")"),
        list: ((list,), "a list such as [1,2]"),
    }
    if expected == "???" and value is None:
        raise Refusal(key, "null", "a value", f"give {key}=... on the command line")
    if expected is None or "???" in (expected, value) or (value is None and key in NULLABLE):
        return
    types, words = allowed[type(expected)]
    is_bool = isinstance(value, bool) and bool not in types
    if is_bool or not isinstance(value, types):
        raise Refusal(key, value, words, f"the default is {expected}")
    if isinstance(value, list) and expected:
        for index, item in enumerate(value):
            _check_type(expected[0], item, f"{key}[{index}]")


def _check_node(node: Any, where: str) -> None:
    """Refuse missing values and keys that are no constructor argument, before anything is built."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            _check_node(item, f"{where}[{index}]")
    if not isinstance(node, dict):
        return
    arguments = [name for name in node if name != "_target_"]
    parameters = _parameters(node["_target_"], where) if "_target_" in node else arguments
    for name in arguments:
        key, value = f"{where}.{name}".lstrip("."), node[name]
        if value == "???":
            raise Refusal(key, value, "a value", f"give {key}=... on the command line")
        if name.startswith("_") or name not in parameters:
            shown = redact({name: value})[name]
            fix = nearest(name, parameters) or f"remove {key}"
            raise Refusal(key, shown, ", ".join(parameters) or "no argument", fix)
        _check_node(value, key)


def _parameters(target: Any, where: str) -> list[str]:
    try:
        cls = allowed_class(target, _PACKAGES, where)
    except ValueError as error:
        allowed = "a public class defined in gossamer.sparse or gossamer.train"
        raise Refusal(f"{where}._target_".lstrip("."), target, allowed, "see conf/") from error
    return list(inspect.signature(cls).parameters)
