"""What an untrained sparse model does on the held-out clips, as the jobs of a sweep leave it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gossamer.train.evaluate import MaskReport
from gossamer.train.found import Found
from gossamer.train.shared_file import leave, take

LATENTS = "latents"


def shared_start(file: Path, measure: Callable[[], Found]) -> Found:
    """Return what another job left in `file`, or what `measure` finds, and leave that."""
    found = take(file, _unpacked)
    if found is None:
        found = measure()
        leave(file, _packed(found))
    return found


def _packed(found: Found) -> bytes:
    masks = found.masks
    assert masks is not None
    groups: dict[str, dict[Any, Tensor]] = {
        "density": masks.density,
        "recall": masks.recall,
        "selected": masks.selected,
        "hit_rate": found.hit_rate,
        "velocities": dict(enumerate(masks.velocities)),
    }
    tensors = {
        f"{group}/{place:05d}/{name}": x.cpu().contiguous()  # of a file they come by name
        for group, named in groups.items()
        for place, (name, x) in enumerate(named.items())
    }
    if found.latents is not None:
        tensors[LATENTS] = found.latents.cpu().contiguous()
    return save(tensors, {"seconds": json.dumps(found.seconds)})


def _unpacked(file: Path) -> Found:
    groups: dict[str, dict[str, Tensor]] = {}
    latents = None
    with safe_open(file, framework="pt") as opened:
        seconds = json.loads(opened.metadata()["seconds"])
        for key in sorted(opened.keys()):
            if key == LATENTS:
                latents = opened.get_tensor(key)
                continue
            group, _, name = key.split("/", 2)
            groups.setdefault(group, {})[name] = opened.get_tensor(key)
    velocities = list(groups.pop("velocities").values())
    hit_rate = groups.pop("hit_rate", {})
    masks = MaskReport(**groups, velocities=velocities)
    return Found(velocities, latents, seconds, masks=masks, hit_rate=hit_rate)
