"""A process that imports the trainer once and forks it for each job, so that a job starts at once.

It says when it is ready, and reads one JSON request a line: {"start": the arguments of `run`}
prints the process id, {"wait": pid} its exit status as subprocess counts it.
"""

import functools
import gc
import json
import os
import runpy
import signal
import sys
import traceback

import av  # noqa: F401  (imported here so that no job has to)
import pyarrow.parquet  # noqa: F401
from diffusers import WanTransformer3DModel  # noqa: F401

from gossamer.train import checkpoint
from gossamer.train import run as _  # noqa: F401  (all that a job imports)
from gossamer.train.cli import main
from gossamer.train.config import compose


def run(
    argv: list[str],
    log: str,
    env: dict[str, str | None],
    hide: str,
    fault: tuple[int, str] | None,
    inject: str,
) -> None:
    """Become a job: what `python -m gossamer.train` does, with stderr and stdout in `log`.

    A variable of `env` that is None is unset. `hide` names a package that cannot be imported,
    `fault` the save and the point to die at, `inject` a function to call first, as FILE:NAME.
    A first argument that is a Python file is run in place of the trainer.
    """
    output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update({name: value for name, value in env.items() if value is not None})
    for name in (name for name, value in env.items() if value is None):
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    if hide:
        sys.modules[hide] = None  # type: ignore[assignment]
    if fault is not None:
        die_in_save(*fault)
    if inject:
        file, _, name = inject.rpartition(":")
        runpy.run_path(file)[name]()
    try:
        if argv[:1] and argv[0].endswith(".py"):
            sys.argv, code = argv, 0
            runpy.run_path(argv[0], run_name="__main__")
        else:
            code = main(["train", *argv])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_in_save(number: int, point: str) -> None:
    """Let the process kill itself at a point of its `number`-th save."""
    save, saves = checkpoint.save, iter(range(1, 10**9))

    @functools.wraps(save)
    def dying(*args: object, **kwargs: object) -> object:
        now = next(saves)

        def fault(here: str) -> None:
            if (now, here) == (number, point):
                os.kill(os.getpid(), signal.SIGKILL)

        return save(*args, fault=fault, **kwargs)  # type: ignore[arg-type]

    checkpoint.save = dying  # type: ignore[assignment]


def serve() -> None:
    for model in ("scratch_wan", "pretrained"):  # fills the caches of schema and grammar
        compose([f"model={model}"])
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run(**request["start"])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
