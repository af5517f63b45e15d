"""One run: its config, its folder, and what its stages share."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from gossamer.sparse.allocation import ErrorBound, Fixed
from gossamer.sparse.attach import attach, method_from_spec
from gossamer.train import checkpoint, progress
from gossamer.train.calibrate import Calibrator
from gossamer.train.calibration import CALIBRATION, Calibration
from gossamer.train.check_masks import is_sparse
from gossamer.train.codec import Codec, load_codec
from gossamer.train.config import build, data_dir, data_url, fingerprint
from gossamer.train.data.dataset import LatentDataset, SomeClips
from gossamer.train.data.quarantine import FILE as QUARANTINE
from gossamer.train.data.shards import Manifest
from gossamer.train.draws import Draws
from gossamer.train.gauge import Gauge
from gossamer.train.launch import Launch, sharding_hidden
from gossamer.train.lora import add_adapters, check_base
from gossamer.train.model import ModelSource
from gossamer.train.negative import is_needed, load_negative
from gossamer.train.parallel import Parallel
from gossamer.train.processes import Together
from gossamer.train.pulse import meeting
from gossamer.train.refusal import Refusal
from gossamer.train.remembered import Remembered
from gossamer.train.samples import evenly, noisy_samples
from gossamer.train.teacher import Cached, Guided, Teacher
from gossamer.train.weights import digest

log = logging.getLogger(__name__)

# What decides the measurements of a calibration.
MEASURED = (
    *("layout", "estimator", "policy", "compensation", "backend", "model", "data", "codec"),
    *("text", "calibration", "evaluation.batch_size"),
)
ASKED = ("sparsity", "error_budget", "allocation")  # of a calibration
Kept = dict[tuple[str, ...], Any]
VELOCITIES = ("velocities",)  # in Kept: the folder in which jobs leave each other the teacher's


class Job:
    """One run: its config, its folder, and the objects that the stages share.

    `kept` is what a process that does several jobs keeps from one to the next, or None.
    """

    def __init__(
        self, cfg: DictConfig, accelerator: Accelerator, stages: list[str], kept: Kept | None = None
    ) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.stages = stages
        self.kept = kept
        self.run_dir = Path(cfg.run_dir)

    @cached_property
    def parallel(self) -> Parallel:
        """Return how the processes share the training; all of them call it first together."""
        return Parallel(self.accelerator, Launch.read(), self.cfg.sequence_parallel)

    @cached_property
    def together(self) -> Together:
        return Together(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """Return what `make` gives; a process that keeps things makes it once for each key."""
        if self.kept is None:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def _only(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """Return `once` of a key, and forget its like: of what is large only the last is kept."""
        kept = {} if self.kept is None else self.kept
        for other in [k for k in kept if k[0] == key[0] and k != key]:
            del kept[other]
        return self.once(key, make)

    @property
    def weights_key(self) -> str:
        """Return the digest of the starting weights for a key of `once`, "" where none is kept."""
        if self.kept is None:
            return ""
        key = "digest", *self._weights_identity(self.cfg.seed)
        found: str = self.once(key, lambda: digest(self._weights(self.cfg.seed)))
        return found

    def _weights_identity(self, seed: int) -> tuple[str, ...]:
        of_seed = "" if self.is_pretrained else str(seed)
        return fingerprint(self.cfg, ["model"]), self.weights_stamp, of_seed

    @cached_property
    def weights_stamp(self) -> str:
        """Return what tells pretrained weights from others at the same path, "" without any."""
        return self.source.stamp()

    @property
    def trains(self) -> bool:
        """Say whether training is one of the run's stages, in this call or another."""
        return "train" in self.cfg.stages

    @property
    def is_pretrained(self) -> bool:
        """Say whether the run starts from a trained model."""
        return self.source.path is not None

    @property
    def is_sparse(self) -> bool:
        return is_sparse(self.cfg)

    @property
    def sparsity(self) -> float:
        """Return the sparsity asked for, or the one that calibration found for the error budget."""
        asked = self.cfg.sparsity
        return 1 - self.calibration.target_density if asked is None else asked

    @cached_property
    def source(self) -> ModelSource:
        source: ModelSource = build(self.cfg.model)
        return source

    @cached_property
    def text(self) -> Any:
        return build(self.cfg.text)

    @cached_property
    def codec(self) -> Codec:
        """Return the codec that the data was encoded with."""
        return load_codec(data_dir(self.cfg) / "codec").to(self.device)

    @cached_property
    def noise(self) -> Any:
        return build(self.cfg.noise)

    @property
    def shift(self) -> float:
        return getattr(self.noise, "shift", 1.0)

    @property
    def method_spec(self) -> dict[str, Any]:
        """Return the config nodes of the sparse method, as the export stores them."""
        names = ("layout", "estimator", "policy", "compensation", "backend")
        spec = OmegaConf.to_container(OmegaConf.masked_copy(self.cfg, list(names)))
        assert isinstance(spec, dict)
        return {str(name): value for name, value in spec.items()}

    def dataset(self, split: str) -> LatentDataset | SomeClips:
        """Return a split of the data; of the training split only what training_data leaves."""
        whole, options = self.whole_split(split), self.cfg.training_data
        return whole.evenly(options.clips) if split == "train" and options.clips else whole

    def whole_split(self, split: str, *, of_data: bool = False) -> LatentDataset:
        """Return all clips of a split; `of_data`: of the run's data, whatever training_data is."""
        options, data = self.cfg.training_data, self.cfg.data
        is_other = split == "train" and bool(options.dir) and not of_data
        folder = Path(options.dir) if is_other else data_dir(self.cfg)
        reading: dict[str, Any] = {
            "url": None if is_other else data_url(self.cfg),
            "cache_gb": data.cache_gb,
            "window": data.window,
        }
        listed = self.run_dir / QUARANTINE
        key = ("dataset", str(folder), split, str(reading))
        opened = self.once(key, lambda: LatentDataset(folder, split, quarantine=listed, **reading))
        return opened if self.kept is None else opened.of_run(listed)

    def dense(self) -> nn.Module:
        """Return the starting transformer with dense attention, frozen, on the device."""
        return self.dense_on_cpu().to(self.device)

    def dense_on_cpu(self) -> nn.Module:
        """Return the starting transformer with dense attention, frozen."""
        return attach(self._weights(self.cfg.seed), None).requires_grad_(False).eval()

    def _weights(self, seed: int) -> nn.Module:
        model = self._only(
            ("weights", *self._weights_identity(seed)), partial(self.source.load, seed)
        )
        return model if self.kept is None else deepcopy(model)

    def guided(self, model: nn.Module) -> nn.Module:
        """Return what the student learns from: the model, guided if guidance.scale says so."""
        scale = self.cfg.guidance.scale
        if scale == 1:
            return model
        return Guided(model, self.negative.to(self.device), scale)

    @cached_property
    def negative(self) -> Tensor:
        """Return the embedding [L, dim] of the negative prompt."""
        return load_negative(self.cfg)

    def draws(self, seed: int) -> Draws:
        """Return how the samples of the training of a seed are drawn."""
        manifest = Manifest.load(data_dir(self.cfg))
        assert manifest is not None  # checked before any stage
        return Draws(
            levels=self.noise,
            seed=seed,
            count=self.cfg.noise_draws,
            clips=manifest.splits["train"],
            negative=self.negative if is_needed(self.cfg) else None,
            negative_share=self.cfg.guidance.negative_share,
        )

    def teacher(self) -> Teacher:
        """Return the started teacher, held as the config says; all processes call it."""
        teacher: Teacher = build(self.cfg.teacher)
        folder = None if self.kept is None else self.kept.get(VELOCITIES)
        if folder is not None and not isinstance(teacher, Cached):
            teacher = Remembered(teacher, folder)
        teacher.start(self)
        return teacher

    def student(self, seed: int) -> nn.Module:
        """Return the starting transformer with the run's attention, trainable, on the device."""
        return self.student_on_cpu(seed).to(self.device)

    def student_on_cpu(self, seed: int) -> nn.Module:
        """Return the starting transformer with the run's attention, budgets set, trainable."""
        model = self._weights(seed)
        if not self.is_sparse:
            attach(model, None)
        else:
            attach(model, method_from_spec(self.method_spec))
            self.calibration.apply(model)
            if seed == self.cfg.seed:  # the weights of the teacher
                weights = {"weights": digest(model)}
                self._refuse_calibration(self.calibration.differs(weights))
        if self.cfg.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.requires_grad_(True)
        if self.cfg.lora.rank:
            add_adapters(model, self.cfg.lora, seed)
        return model

    @property
    def calibration_dir(self) -> Path:
        return Path(self.cfg.calibration.path or self.run_dir / "calibration")

    @property
    def masks_asked(self) -> dict[str, Any]:
        """Return what decides a calibration, but for the model's weights."""
        spec = self.method_spec
        names = ["layout", "estimator"]
        allocation = build(self.cfg.allocation)
        names += ["policy"] * isinstance(allocation, Fixed | ErrorBound)
        names += ["compensation"] * isinstance(allocation, ErrorBound)
        asked = OmegaConf.to_container(OmegaConf.masked_copy(self.cfg, list(ASKED)))
        assert isinstance(asked, dict)
        return {str(k): v for k, v in asked.items()} | {name: spec[name] for name in names}

    def calibrator(self, teacher: nn.Module, clips: list[int] | None = None) -> Calibrator:
        """Return the calibrator of a dense teacher on training clips (evenly spaced ones).

        Of data in several sizes they are of the largest: budgets are shares, and carry over.
        """
        options, dataset = self.cfg.calibration, self.whole_split("train", of_data=True)
        largest = dataset.largest
        if clips is None:
            clips = [largest[i] for i in evenly(len(largest), options.clips)]
        levels, batch_size = list(options.noise_levels), self.cfg.evaluation.batch_size
        samples = noisy_samples([dataset[i] for i in clips], levels, batch_size, self.device)
        return Calibrator(
            Gauge(
                teacher,
                method_from_spec(self.method_spec),
                samples,
                noise_levels=levels,
                densities=list(options.densities),
                probes=options.probes,
                seed=self.cfg.seed if options.seed is None else options.seed,
                accelerator=self.accelerator,
            )
        )

    def own_calibrator(self) -> Calibrator:
        """Return the run's calibrator; the last is kept for runs that share what it measured."""
        found: Calibrator = self._only(
            ("calibrator", *self.measured), lambda: self.calibrator(self.dense_on_cpu())
        )
        found.gauge.teacher.to(self.device)
        return found

    @property
    def measured(self) -> tuple[str, ...]:
        """Return what decides the measurements of a calibration, where any is kept."""
        if self.kept is None:
            return ()
        keys = [*MEASURED, *([] if self.cfg.calibration.seed is not None else ["seed"])]
        request = self.whole_split("train", of_data=True).manifest.request
        return fingerprint(self.cfg, keys), self.weights_key, json.dumps(request, sort_keys=True)

    @cached_property
    def calibration(self) -> Calibration:
        if not (self.calibration_dir / CALIBRATION).is_file():
            raise Refusal(
                "calibration.path",
                self.calibration_dir,
                f"a folder with {CALIBRATION}",
                "run `gossamer calibrate` first",
            )
        found = Calibration.load(self.calibration_dir)
        self._refuse_calibration(found.differs(self.masks_asked))
        return found

    def _refuse_calibration(self, difference: str) -> None:
        if difference:
            raise Refusal(
                "calibration",
                self.calibration_dir,
                f"one made for this model and these masks ({difference})",
                "set calibration.path=null, delete that folder if it is the run's own, and run "
                "`gossamer calibrate`",
            )

    def seed_dir(self, seed: int) -> Path:
        """Return where a seed's metrics and checkpoints are: the run itself, or a repeat."""
        return self.run_dir if seed == self.cfg.seed else self.run_dir / "repeats" / f"seed-{seed}"

    @property
    def seeds(self) -> list[int]:
        return [self.cfg.seed, *self.cfg.repeat_seeds]

    def newest_checkpoint(self, seed: int) -> Path:
        """Return a seed's newest whole checkpoint; Refusal where there is none."""
        folder = self.seed_dir(seed) / "checkpoints"
        newest = checkpoint.latest(folder)
        if newest is None:
            raise Refusal("checkpoints", folder, "a finished training", "run `gossamer train`")
        return newest

    def trained(self, seed: int) -> nn.Module:
        """Return the student of a seed at its newest checkpoint (EMA weights if kept), in eval."""
        newest = self.newest_checkpoint(seed)
        self.log("taking the student of %s", newest)
        tensors, state = checkpoint.read(newest)
        model = self.student(seed)
        check_base(model, state.get("base"), newest)
        progress.load_student(model, tensors["model"], newest)
        for name, parameter in model.named_parameters():
            if name in tensors.get("ema", {}):
                parameter.data.copy_(tensors["ema"][name][...])
        return model.requires_grad_(False).eval()

    def autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    def log(self, message: str, *values: object) -> None:
        if self.accelerator.is_main_process:
            log.info(message, *values)


def make_accelerator(cfg: DictConfig) -> Accelerator:
    """Return the accelerator for the config's device; refuse what accelerate would do silently."""
    from datetime import timedelta

    from accelerate.utils import InitProcessGroupKwargs

    cpu = cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available())
    # rank 0 encodes, evaluates and exports while others wait; a dead one ends all (train/pulse.py)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    with sharding_hidden(), meeting():
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patient])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise Refusal(
            "mixed_precision", accelerator.mixed_precision, "no or bf16", "launch with bf16"
        )
    return accelerator
