"""A calibration as the jobs of a sweep leave it to equal ones."""

import hashlib
import logging
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.train.calibration import CALIBRATION
from gossamer.train.config import fingerprint
from gossamer.train.files import publish, write_atomic
from gossamer.train.job import ASKED

if TYPE_CHECKING:
    from gossamer.train.job import Job

log = logging.getLogger(__name__)

CALIBRATIONS = "calibrations"  # beside the runs


def leave(job: "Job") -> None:
    """Leave the run's calibration to others; a disk that takes no more fails no job."""
    folder = _folder(job)
    if folder is None or folder.exists():
        return
    own = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        shutil.copytree(job.calibration_dir, own)
        publish(own, folder)
    except OSError as error:
        if not folder.exists():  # another job was not first
            log.warning("%s is not left to other jobs: %s", folder, error)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def take(job: "Job") -> bool:
    """Copy an equal job's calibration into the run, if there is one, and say whether it did."""
    folder = _folder(job)
    if folder is None or not (folder / CALIBRATION).is_file():
        return False
    last = shutil.ignore_patterns(CALIBRATION)  # a run that has it has all
    shutil.copytree(folder, job.calibration_dir, dirs_exist_ok=True, ignore=last)
    write_atomic(job.calibration_dir / CALIBRATION, (folder / CALIBRATION).read_bytes())
    job.log("calibration taken from %s", folder)
    return True


def _folder(job: "Job") -> Path | None:
    if job.kept is None or job.cfg.calibration.path is not None:
        return None
    asked = fingerprint(job.cfg, ASKED)
    key = "\n".join((job.accelerator.mixed_precision, asked, *job.measured))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return job.run_dir.parent / CALIBRATIONS / name
