"""Write a velocity cache: all processes, each its share of the files; finished files stay."""

import dataclasses
import json
import logging
from contextlib import ExitStack
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from gossamer.train.data.dataset import LatentDataset, collate
from gossamer.train.files import is_seen, sha256, write_atomic
from gossamer.train.processes import accepted, agreed, on_main
from gossamer.train.refusal import Refusal
from gossamer.train.run_lock import RunLock
from gossamer.train.velocities import (
    MANIFEST,
    SPLIT,
    VelocityCache,
    VelocityManifest,
    name_of,
    request_of,
    velocities_of,
)
from gossamer.train.weights import digest

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

BEGUN = "begun.json"  # what the files of an unfinished cache are made for
FILE_BYTES = 512 * 2**20
MOST_PROCESSES = 64


def write_cache(job: "Job", folder: Path) -> None:
    """Write the velocities of the training split into `folder`, where they are not there yet.

    Raises Refusal where the folder holds a cache of another run, or another run writes into it.
    """
    with ExitStack() as held:
        is_done = on_main(partial(_begin, job, folder, held), job.accelerator)
        if agreed(bool(is_done), job.accelerator):
            return
        begun = job.together.gather(_text(folder / BEGUN) if job.together.is_first else "")[0]
        accepted(partial(_check_begun, folder, begun), job.together)
        _write_files(job, folder)
        job.accelerator.wait_for_everyone()
        on_main(partial(_finish, job, folder), job.accelerator)


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _check_begun(folder: Path, begun: str) -> None:
    if not is_seen(lambda: _text(folder / BEGUN) == begun):
        fix = "put it on a disk that all of them see (teacher.path=...)"
        raise Refusal("teacher.path", folder, "one folder that all machines share", fix)


def _begin(job: "Job", folder: Path, held: ExitStack) -> bool:
    """Verify a finished cache, and say that it is one.

    Else lock the folder, which a worker of a sweep waits for and then looks again, note what is
    begun, and clear files made for other things.
    """
    if _is_finished(job, folder):
        return True
    held.enter_context(RunLock(folder, "teacher.path", wait=job.kept is not None))
    if _is_finished(job, folder):
        return True
    values = {
        "request": {**request_of(job.cfg), "teacher": digest(job.dense_on_cpu())},
        "precision": str(job.accelerator.mixed_precision),
    }
    text = json.dumps(values, sort_keys=True)
    begun = folder / BEGUN
    if not begun.is_file() or begun.read_text() != text:
        for file in folder.glob("clips-*.safetensors"):
            file.unlink()
    write_atomic(begun, text)
    return False


def _is_finished(job: "Job", folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    VelocityCache.open(folder).verify(job, samples=0)
    log.info("%s is already of this teacher and data, and verified: nothing to do", folder)
    return True


def _write_files(job: "Job", folder: Path) -> None:
    from safetensors.torch import save

    dataset, draws = job.whole_split(SPLIT), job.draws(job.cfg.seed)
    model = job.guided(job.dense())
    size, rank = job.cfg.evaluation.batch_size, job.accelerator.process_index
    mine = _files(dataset, job.cfg.noise_draws)[rank :: job.accelerator.num_processes]
    mine = [clips for clips in mine if not (folder / name_of(clips)).is_file()]
    with tqdm(
        total=sum(map(len, mine)),
        desc="teacher velocities",
        unit="clip",
        disable=not job.accelerator.is_main_process,
    ) as bar:
        for clips in mine:
            rows: dict[str, Tensor] = {}
            for some in dataset.runs(clips, size):
                batch = collate([dataset[clip] for clip in some])
                with job.autocast():
                    drawn = [
                        velocities_of(model, draws, batch, draw, job.device)
                        for draw in range(job.cfg.noise_draws)
                    ]
                stacked = torch.stack(drawn, dim=1).bfloat16()  # [B, draws, C, f, h, w]
                if not stacked.isfinite().all():
                    raise Refusal(
                        f"velocities of clips {some[0]} to {some[-1]}",
                        "NaN or infinity",
                        "finite numbers",
                        "check the model's weights",
                    )
                rows |= {str(c): row.contiguous() for c, row in zip(some, stacked, strict=True)}
                bar.update(len(some))
            write_atomic(folder / name_of(clips), save(rows))


def _finish(job: "Job", folder: Path) -> None:
    dataset = job.whole_split(SPLIT)
    names = [name_of(clips) for clips in _files(dataset, job.cfg.noise_draws)]
    manifest = VelocityManifest(
        **json.loads((folder / BEGUN).read_text()),
        clips=len(dataset),
        files={name: sha256(folder / name) for name in names},
    )
    write_atomic(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1))
    (folder / BEGUN).unlink()
    log.info("%d x %d velocities in %s", len(dataset), job.cfg.noise_draws, folder)


def _files(dataset: LatentDataset, draws: int) -> list[range]:
    """Cut the clips into files of at most FILE_BYTES or one clip, for many processes to share."""
    size, total = 2 * draws * prod(dataset.shape(dataset.largest[0])), len(dataset)
    each = max(1, min(FILE_BYTES // size, ceil(total / MOST_PROCESSES)))
    return [range(first, min(first + each, total)) for first in range(0, total, each)]
