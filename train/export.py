"""Write a diffusers folder: a dense-loadable transformer and the mask policy beside it."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.sparse.attach import CONFIG_NAME, attentions, detach, mask_state, save_policy
from gossamer.sparse.attention import SparseAttention
from gossamer.train.files import publish, sha256, write_atomic
from gossamer.train.lora import FILE, base_of, save_adapter
from gossamer.train.pipeline import INDEX, LatentVideoPipeline
from gossamer.train.refusal import Refusal

log = logging.getLogger(__name__)

WHOLE_USAGE = """`transformer/` loads in stock diffusers as the dense model;
`gossamer.load_pipeline(folder)` runs it with the sparse attention it was trained with."""
ADAPTER_USAGE = f"""`{FILE}` is a LoRA adapter of the model named below:

    pipe.transformer.load_lora_adapter(folder, use_safetensors=True)  # pip install peft
    gossamer.attach(pipe, folder)  # the sparse attention it was trained with"""


def export(
    student: nn.Module,
    folder: Path,
    *,
    spec: dict[str, Any] | None,
    pipeline: LatentVideoPipeline | Path | None,
    card: str,
    overwrite: bool,
    dtype: torch.dtype,
    before_publish: Callable[[Path], None],
) -> None:
    """Export a student (its processors are taken out) to `folder`.

    A student with adapters gives a folder with them alone; merge them first to export it whole.
    `spec` describes the mask policy (None for a dense model); `pipeline` is the embedded pipeline,
    or the folder of a diffusers pipeline whose other components are linked or copied, or None for
    the transformer alone. `before_publish` sees the finished folder before it gets its name, and
    may raise. Raises Refusal when the folder exists and overwrite is False.
    """
    if folder.exists() and not overwrite:
        raise refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sparse = any(isinstance(a, SparseAttention) for a in attentions(student).values())
    state = {name: tensor.clone() for name, tensor in mask_state(student).items()}
    detach(student)
    if sparse:
        assert spec is not None
        save_policy(partial, spec, state)
    _cast(student, dtype)
    if base_of(student):
        save_adapter(student, partial)
    else:
        student.save_pretrained(partial / "transformer")
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files for the owner alone
    if isinstance(pipeline, LatentVideoPipeline):
        pipeline.save(partial)
    elif pipeline is not None:
        _link_components(pipeline, partial)
    (partial / "README.md").write_text(card)
    before_publish(partial)
    shutil.rmtree(folder, ignore_errors=True)
    publish(partial, folder)
    log.info("exported to %s (%s)", folder, f"with {CONFIG_NAME}" if sparse else "dense")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters, but for those that diffusers itself keeps in fp32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def refuse_existing(folder: Path) -> Refusal:
    """Return the refusal of an export that is there and would be replaced."""
    return Refusal(
        "export",
        folder,
        "a folder that does not exist, or the export of the same checkpoint",
        "set export.overwrite=true to replace it",
    )


def write_receipt(file: Path, folder: Path, checkpoint: dict[str, Any]) -> None:
    """Note in `file` which checkpoint the export in `folder` holds."""
    write_atomic(file, json.dumps({"checkpoint": checkpoint, "files": _hashes(folder)}, indent=1))


def is_export_of(file: Path, folder: Path, checkpoint: dict[str, Any]) -> bool:
    """Return whether `folder` holds, unchanged, what the receipt says and the checkpoint gives."""
    if not file.is_file():
        return False
    return json.loads(file.read_text()) == {"checkpoint": checkpoint, "files": _hashes(folder)}


def _hashes(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of what training changes: the transformer and the files at the top."""
    files = [*folder.glob("*"), *(folder / "transformer").glob("*")]
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(files) if f.is_file()}


def _link_components(source: Path, target: Path) -> None:
    """Hard-link (or copy) every component of a pipeline folder but the transformer."""
    if not (source / INDEX).is_file():
        return
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        relative = file.relative_to(source)
        if relative.parts[0] in ("transformer", "README.md") or relative.parts[0].startswith("."):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target / relative)
        except OSError:
            shutil.copy2(file, target / relative)


def model_card(name: str, lines: dict[str, Any], usage: str) -> str:
    """Return a README with diffusers' front matter, how to load it and one line for each fact."""
    facts = "\n".join(f"- {key}: {value}" for key, value in lines.items())
    return f"""---
library_name: diffusers
tags: [video, sparse-attention, gossamer]
---
# {name}

Exported by gossamer. {usage}

{facts}
"""
