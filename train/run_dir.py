"""The folder of a run belongs to one config."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gossamer.train.redact import redact
from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

CONFIG, RESULT = "config.yaml", "result.json"
STARTS = "starts"  # beside the runs of a sweep, until all are done: what their untrained models do
# Keys that may change between two calls of the same run; its folder may be moved.
FREE_KEYS = (
    "resume",
    "debug",
    "stages",
    "num_workers",
    "log_every",
    "tracker",
    "export",
    "sequence_parallel",
)
FREE_DATA_KEYS = ("data.cache", "data.cache_gb")
PER_PROCESS = ("num_workers", "debug")  # may differ between the processes of a run
PLACE_KEYS = ("name", "runs_dir", "run_dir")


def check_run_dir(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse a folder that holds a run of another config, unless resume=force."""
    path = run_dir / CONFIG
    if not path.is_file():
        return
    if cfg.resume == "never":
        raise Refusal("run_dir", run_dir, "a new folder (resume=never)", "set name=NEW")
    try:
        before = flat(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        fix = f"set name=NEW, or delete it to go on with this config: {error}"
        raise Refusal("run_dir", path, "a config that can be read", fix) from error
    now = flat(cfg)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if not changed:
        return
    shown = ", ".join(f"{k}: {before.get(k)} -> {now.get(k)}" for k in changed[:5])
    if cfg.resume != "force":
        raise Refusal(
            "run_dir",
            run_dir,
            f"a folder of the same config ({len(changed)} keys differ: {shown})",
            "set name=NEW, or resume=force to go on with the new values",
        )
    log.warning("resume=force: going on although these keys changed: %s", shown)


def flat(cfg: Any, free: tuple[str, ...] = (*FREE_KEYS, *PLACE_KEYS)) -> dict[str, Any]:
    """Return dotted key -> redacted value of what decides a run's result: all but `free` keys."""
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}".lstrip("."), value)
        elif prefix not in FREE_DATA_KEYS:
            found[prefix] = node

    container = redact(OmegaConf.to_container(cfg, resolve=True))  # as save_config wrote it
    if not isinstance(container, dict):
        raise ValueError("it holds no keys")
    walk("", {k: v for k, v in container.items() if k not in free})
    return found
