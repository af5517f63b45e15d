"""The arms of a study: named lists of overrides, in a file beside its recipe."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from gossamer.train.config import parse_overrides
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

FILE = "arms.yaml"
ALL = "all"


def load_arms(recipe: str | None) -> dict[str, list[str]]:
    """Return name -> overrides of recipes/RECIPE/arms.yaml; Refusal where there is none."""
    own = recipe is not None and recipe.endswith(".yaml")
    folder = Path(str(recipe)).with_suffix("") if own else _packaged(recipe)
    path = folder / FILE
    if not path.is_file():
        allowed = f"a recipe that has {FILE} in a folder of its name"
        raise Refusal("sweep.arms", path, allowed, "recipe=study, or write that file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Refusal("sweep.arms", path, "a YAML file", str(error).replace("\n", " ")) from error
    ok = isinstance(content, dict) and all(
        isinstance(lines, list) and all(isinstance(line, str) for line in lines)
        for lines in content.values()
    )
    if not ok or not content:
        raise Refusal("sweep.arms", path, "NAME: [key=value, ...] for each arm", "mend the file")
    return {str(name): lines for name, lines in content.items()}


def choose_arms(known: dict[str, list[str]], asked: Any) -> dict[str, list[Override]]:
    """Return the arms that are asked for (a name, several, or all), parsed, in the order asked.

    Refusal for a name that is not there.
    """
    names = [str(name) for name in (asked if isinstance(asked, list) else [asked])]
    for name in names:
        if name not in known and name != ALL:
            fix = nearest(name, known) or "sweep.arms=all takes every one"
            raise Refusal("sweep.arms", name, f"{ALL}, {', '.join(known)}", fix)
    chosen = known if ALL in names else names
    return {name: parse_overrides(known[name]) for name in chosen}


def merge(arm: Sequence[Override], others: Sequence[Override]) -> list[Override]:
    """Return the overrides of a sweep and of an arm, which wins where both give a key."""
    own = {override.key_or_group for override in arm}
    return [*(o for o in others if o.key_or_group not in own), *arm]


def _packaged(recipe: str | None) -> Path:
    return Path(str(files("gossamer.recipes"))) / str(recipe)
