"""Refusals of data that a run cannot use, before anything is read of it but its manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gossamer.train.codec import Codec
from gossamer.train.config import data_dir, data_url
from gossamer.train.data.shards import MANIFEST, Manifest
from gossamer.train.data.store import mirror
from gossamer.train.refusal import Refusal
from gossamer.train.text import TextEncoder


def check_data(
    cfg: DictConfig, stages: list[str], codec: Codec, text: TextEncoder, condition: str
) -> Mapping[str, Any]:
    """Refuse a source that is not there, and encoded data that this run cannot use.

    Returns the settings of the encode.
    """
    folder, url = data_dir(cfg), data_url(cfg)
    has_source = "source" in cfg.data
    if url is not None:
        mirror(url, folder)
    manifest = Manifest.load(folder)
    settings = cfg.data if has_source or manifest is None else manifest.request
    if settings.get("condition", condition) != condition:
        raise Refusal(
            "data.condition",
            settings["condition"],
            f"{condition}, as model.condition",
            f"data.condition={condition}",
        )
    if "encode" in stages and has_source and url is None:
        codec.check_weights()
        text.check_weights()
    if manifest is None:
        if "encode" not in stages or not has_source:
            raise Refusal(
                "data.dir", folder, f"a folder with {MANIFEST}", "run gossamer encode first"
            )
        if not Path(cfg.data.source).exists():
            raise Refusal(
                "data.source",
                cfg.data.source,
                "a video file, a folder of videos or a list file",
                "correct the path",
            )
        if "evaluate" in stages and cfg.data.holdout == 0:
            raise Refusal("data.holdout", 0, "above 0 to evaluate", "use e.g. 0.3")
        return settings
    check_splits(manifest, folder, stages)
    stored = {f"data.{n}": value for n, value in manifest.request.items() if n in cfg.data}
    if has_source:
        stored.setdefault("data.buckets", None)
    asked = {name: OmegaConf.select(cfg, name) for name in stored}
    stored |= {f"text.{n}": manifest.text[n] for n in ("dim", "length")}
    asked |= {"text.dim": text.dim, "text.length": text.length}
    stored["codec.channels"], asked["codec.channels"] = manifest.codec["channels"], codec.channels
    for name, value in asked.items():
        if stored[name] != value:
            raise Refusal(
                name, value, f"{stored[name]}, as encoded in {folder}", "set data.dir=NEW_FOLDER"
            )
    return settings


def check_training_data(cfg: DictConfig) -> None:
    """Refuse other training clips than the data's that the model and the run cannot use."""
    own = Manifest.load(data_dir(cfg))
    options = cfg.training_data
    if cfg.noise_draws and (options.dir or options.clips):
        raise Refusal("noise_draws", cfg.noise_draws, "0 with training_data", "leave one out")
    if options.dir is None:
        return
    other = Manifest.load(Path(options.dir))
    if other is None or "train" not in other.splits:
        allowed = f"a folder with {MANIFEST} and training clips"
        fix = "run gossamer encode with data.dir set to it"
        raise Refusal("training_data.dir", options.dir, allowed, fix)
    for name in ("codec", "text"):
        if own is not None and getattr(own, name) != getattr(other, name):
            allowed = f"clips of the same {name} as in {data_dir(cfg)}"
            fix = f"encode them with {name} as the model's ({name}.path=...)"
            raise Refusal("training_data.dir", options.dir, allowed, fix)


def check_splits(manifest: Manifest, folder: Path, stages: list[str]) -> None:
    """Refuse encoded data without the clips that a stage reads."""
    read_by = {"calibrate": "train", "train": "train", "evaluate": "heldout", "export": "train"}
    for stage in (s for s in stages if s in read_by):
        if read_by[stage] not in manifest.splits:
            raise Refusal(
                "data.dir",
                folder,
                f"data with {read_by[stage]} clips, for {stage} (it has {manifest.splits})",
                "give a source with more shots or change data.holdout, with data.dir=NEW_FOLDER",
            )
