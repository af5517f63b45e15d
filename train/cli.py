"""`gossamer VERB [key=value ...]`: one process; `train` also runs under accelerate launch."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from gossamer import __version__
from gossamer.train.interrupt import Terminated, terminable
from gossamer.train.refusal import Refusal
from gossamer.train.suggest import nearest

VERBS = {
    "check": "can this machine, model and config run? Reads no weights",
    "encode": "videos and captions to latent shards; with teacher=cached velocities too",
    "calibrate": "the dense teacher's attention to mask budgets per head",
    "train": "all stages of the config: encode, calibrate, train, evaluate, export, report",
    "evaluate": "student against teacher on held-out clips",
    "report": "results to one HTML page with plots",
    "export": "student to a diffusers folder with its mask policy",
    "bench": "time dense and sparse attention on this GPU; has keys of its own",
    "sweep": "one run per combination of a=1,2 b=x,y; then a table and a Pareto plot",
}
FLAGS = {
    "--help": "this text, or the verb's",
    "--cfg": "print the composed config with a comment per key, and stop",
    "--version": "print the version, and stop",
}
SWEEP = """\
  sweep.num_processes=1         processes of each run
  sweep.mixed_precision=bf16    or no; what was found in one is not taken for the other
  sweep.workers=N               N processes that do one run after the other, one to a GPU
  sweep.time_limit=SECONDS      with workers: stop in time; the same command goes on
  sweep.grace=120               seconds that a run told to stop may take to save its step
  sweep.velocities=FOLDER       with workers: runs that draw the same samples ask the teacher once
  sweep.arms=all                the arms of the recipe (recipes/NAME/arms.yaml), or names of some
  sweep.results=FILE.jsonl      keep a line for each finished run; runs in it are not done again
  sweep.keep_checkpoints=false  with results: delete those of finished runs
"""
REFUSED, INTERRUPTED, TERMINATED = 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    2 for bad input, 3 for a disk that fails, 4 for too little memory, 130 for Ctrl-C, 143 for
    SIGTERM.
    """
    arguments = ["--help" if a == "-h" else a for a in (sys.argv[1:] if argv is None else argv)]
    # Else, on some processors, MKL rounds by where tensors lie in memory: no run repeats its bits.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    try:
        # The other processes of a run may wait in a collective, where no handler would run.
        with terminable() if _is_first() else nullcontext():
            return _dispatch(arguments)
    except Refusal as refusal:
        if "debug=true" in (argument.lower() for argument in arguments):
            raise
        sys.stderr.write(f"error: {refusal}\n")
        return refusal.code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write("terminated\n")
        return TERMINATED


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _dispatch(arguments: list[str]) -> int:
    flags = [argument for argument in arguments if argument.startswith("-")]
    words = [argument for argument in arguments if argument not in flags]
    for flag in flags:
        if flag not in FLAGS:
            fix = nearest(flag, FLAGS) or "settings are given as key=value"
            raise Refusal("option", flag, ", ".join(FLAGS), fix)
    if "--version" in flags:
        return _show(f"gossamer {__version__}\n")
    if not words:
        return _show(_help())
    verb, *overrides = words
    if verb not in VERBS:
        fix = nearest(verb, VERBS) or "write gossamer VERB key=value ..."
        raise Refusal("verb", verb, ", ".join(VERBS), fix)
    if "--help" in flags:
        return _show(_verb_help(verb))
    set_up_logging()
    if verb == "bench":
        from gossamer.benchmarks.command import bench

        words = [word for word in overrides if word.lower() != "debug=true"]
        return bench(words, only_show="--cfg" in flags)
    if verb == "sweep":
        from gossamer.train.sweep import sweep

        return sweep(overrides, only_show="--cfg" in flags)
    return _run(verb, overrides, only_show="--cfg" in flags)


def _run(verb: str, overrides: list[str], *, only_show: bool) -> int:
    from gossamer.train.config import compose, require_complete

    cfg = compose(overrides)
    if only_show:
        from gossamer.train.explain import explain

        return _show(explain(cfg))
    require_complete(cfg)
    if verb == "check":
        from gossamer.train.check import check

        check(cfg)
        return 0
    from gossamer.train.run import run

    run(cfg, stages=list(cfg.stages) if verb == "train" else [verb])
    return 0


def _show(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _help() -> str:
    rows = [*VERBS.items(), ("", ""), *FLAGS.items()]
    table = "\n".join(f"  {name:<10} {text}".rstrip() for name, text in rows)
    return (
        "Turn a pretrained dense video diffusion transformer into a sparse one.\n\n"
        f"usage: gossamer VERB [recipe=NAME] [key=value ...]\n\n{table}\n\n"
        "several processes: accelerate launch [flags] -m gossamer.train recipe=NAME key=value ...\n"
    )


def _verb_help(verb: str) -> str:
    if verb == "bench":
        from gossamer.benchmarks.settings import usage

        return f"gossamer bench: {VERBS[verb]}\n\n{usage()}"
    from gossamer.train.config import groups, recipes

    example = "sparsity=0.8,0.9" if verb == "sweep" else "sparsity=0.8"
    options = "\n".join(f"  {group:<13} {', '.join(names)}" for group, names in groups().items())
    launch = SWEEP if verb == "sweep" else ""
    return (
        f"gossamer {verb}: {VERBS[verb]}\n\n"
        f"usage: gossamer {verb} [recipe=NAME] [group=option ...] [key=value ...]\n"
        f"for example: gossamer {verb} recipe=demo {example}\n{launch}\n"
        f"recipes: {', '.join(recipes())}\ngroups:\n{options}\n\n"
        f"gossamer {verb} --cfg lists every key with its value and meaning.\n"
    )


def set_up_logging() -> None:
    """Show this package's messages, of the first process only; keep other libraries quiet."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("gossamer")
    logger.setLevel(logging.INFO if _is_first() else logging.WARNING)
    if not logger.handlers:
        handler = _BesideBars()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


class _BesideBars(logging.Handler):
    """Writes to stderr without tearing progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
