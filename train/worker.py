"""One process of a sweep that does many jobs: imports, weights and teacher outputs stay loaded.

Reads {"overrides", "log"} as JSON, one job a line, and answers each with the exit code that
`gossamer train` would give. A SIGTERM ends the job in hand as it ends any other: a training saves
its step. What jobs print goes to their own log.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from gossamer.train.cli import TERMINATED, set_up_logging
from gossamer.train.interrupt import Terminated, terminable
from gossamer.train.refusal import Refusal


def serve(requests: IO[str], answers: IO[str], velocities: Path | None = None) -> None:
    """Do the jobs that arrive on `requests` until it ends.

    `velocities` is the folder in which they share those of their teachers (train/remembered.py).
    """
    from gossamer.sparse.attach import families
    from gossamer.train import run  # noqa: F401  (the slow imports, once)
    from gossamer.train.job import VELOCITIES

    families()

    kept: dict[tuple[str, ...], Any] = {VELOCITIES: velocities}
    for line in requests:
        request = json.loads(line)
        log = os.open(request["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        code = work(request["overrides"], kept)
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(f"{code}\n")
        answers.flush()


def work(overrides: Sequence[str], kept: dict[tuple[str, ...], Any]) -> int:
    """Do one job, say on stderr what went wrong, and return its exit code."""
    import torch

    from gossamer.train.config import compose, require_complete
    from gossamer.train.run import run

    try:
        with terminable():
            cfg = compose(overrides)
            require_complete(cfg)
            run(cfg, kept=kept)
        return 0
    except Refusal as refusal:
        sys.stderr.write(f"error: {refusal}\n")
        return refusal.code
    except Terminated:
        return TERMINATED
    except SystemExit as end:  # a training that was stopped
        return end.code if isinstance(end.code, int) else 1
    except Exception:  # whatever a job does, the next one is another matter
        traceback.print_exc()
        return 1
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    set_up_logging()
    with os.fdopen(os.dup(1), "w") as answers:
        serve(sys.stdin, answers, *map(Path, sys.argv[1:]))
