"""The composed config as YAML with the comments of conf/ beside its keys: what --cfg prints."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from gossamer.train.config import groups
from gossamer.train.redact import redact

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?P<value>.*?)(?: +# (?P<comment>.*))?$")


def explain(cfg: DictConfig) -> str:
    """Return the config as YAML, each line with the comment that conf/ gives its key."""
    values = redact(OmegaConf.to_container(cfg, resolve=True))
    comments = _all_comments(values)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=2**16, allow_unicode=True)
    lines = []
    for key, match in _keys(text):
        comment = comments.get(key)
        lines.append(match.group(0) + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Writes each list in one line, so that every line of the text has a key."""

    def represent_row(self, values: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_row)


def _all_comments(values: dict[str, Any]) -> dict[str, str]:
    """Collect dotted key -> comment; of options with the same class the last one's."""
    conf = Path(str(files("gossamer.conf")))
    comments = _comments((conf / "config.yaml").read_text(encoding="utf-8"))
    for group, options in groups().items():
        target = values[group].get("_target_", "")
        for option in options:
            text = (conf / group / f"{option}.yaml").read_text(encoding="utf-8")
            if target in text:
                comments |= {f"{group}.{key}": said for key, said in _comments(text).items()}
    return comments


def _comments(text: str) -> dict[str, str]:
    return {key: match["comment"] for key, match in _keys(text) if match["comment"]}


def _keys(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the dotted key of each `key: value` line, and the line's parts."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            indent = len(match["indent"])
            parents = [(depth, key) for depth, key in parents if depth < indent]
            parents.append((indent, match["key"]))
            yield ".".join(key for _, key in parents), match
