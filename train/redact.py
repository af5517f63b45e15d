"""Keep secrets out of everything that is written: configs, logs, trackers, tables."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_WORD = re.compile(r"(key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_URL_USER = re.compile(r"(\w+://)[^/@\s]+@")
_URL_QUERY = re.compile(r"([?&][\w-]*(?:key|token|secret|password)=)[^&\s]+", re.IGNORECASE)
_REDACTED = "<redacted>"


def redact(container: Any, *, is_secret: bool = False) -> Any:
    """Replace texts under names such as api_key or hf_token, and credentials in URLs, at any depth.

    Only texts are secrets: `use_cls_token: true` and `max_tokens: 512` stay.
    """
    match container:
        case Mapping():
            return {
                name: redact(value, is_secret=is_secret or _is_secret_name(str(name)))
                for name, value in container.items()
            }
        case list() | tuple():
            return [redact(value, is_secret=is_secret) for value in container]
        case str() if is_secret:
            return _REDACTED if container else ""
        case str():
            return _URL_QUERY.sub(rf"\1{_REDACTED}", _URL_USER.sub(rf"\1{_REDACTED}@", container))
        case _:
            return container


def _is_secret_name(name: str) -> bool:
    return any(_SECRET_WORD.search(word) for word in _WORDS.findall(name))
