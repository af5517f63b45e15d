"""Build objects from `_target_` nodes, with this package's own classes as the allow-list."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import isclass
from typing import Any

SPARSE = ("gossamer.sparse.",)


def construct(node: Any, *, packages: tuple[str, ...] = SPARSE, path: str = "") -> Any:
    """Return `node` with every mapping that has a `_target_` built, inner ones first.

    Raises ValueError naming the config path when the class is not one that is defined in
    `packages`, or when its constructor refuses the arguments. Nothing is imported outside
    `packages`, because a config could otherwise run any code it names.
    """
    if isinstance(node, Mapping):
        built = {
            key: construct(value, packages=packages, path=f"{path}.{key}".lstrip("."))
            for key, value in node.items()
            if key != "_target_"
        }
        if "_target_" not in node:
            return built
        return _call(allowed_class(node["_target_"], packages, path), built, path)
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return [construct(v, packages=packages, path=f"{path}[{i}]") for i, v in enumerate(node)]
    return node


def allowed_class(target: object, packages: tuple[str, ...], path: str = "") -> type:
    """Return the public class that `target` names, if it is defined in one of `packages`."""
    field = f"{path}._target_".lstrip(".")
    allowed = f"a public class defined under {' or '.join(p.rstrip('.') for p in packages)}"
    refusal = f"{field}={target}: allowed is {allowed}; name the class with its full module path"
    if not isinstance(target, str) or not target.startswith(packages):
        raise ValueError(refusal)
    module_name, _, name = target.rpartition(".")
    if name.startswith("_") or not all(part.isidentifier() for part in target.split(".")):
        raise ValueError(refusal)
    try:
        found = getattr(import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("gossamer"):
            raise  # a dependency is missing: not the config's fault
        raise ValueError(refusal) from error
    if not isclass(found) or found.__module__ != module_name:
        raise ValueError(refusal)
    return found


def _call(cls: type, arguments: dict[str, Any], path: str) -> Any:
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path or cls.__name__}: {error}") from error
