"""What a study found, as a page; its teacher's attention mass; a film for mismatched data.

python -m gossamer.train.study numbers RESULTS.jsonl PAGE.md
python -m gossamer.train.study page RESULTS.jsonl SWEEP_FOLDER PAGE.html [--arms C F]
python -m gossamer.train.study mass PAGE.md recipe=study model.path=TEACHER layout.block=[4,4,4]
"""

import argparse
import sys
from pathlib import Path

from gossamer.train.refusal import in_one_line
from gossamer.train.study.record import Results


@in_one_line
def main(arguments: list[str]) -> int:
    """Write the page and return 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.train.study")
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = commands.add_parser("numbers", help="Markdown tables, verdicts and a Pareto plot")
    numbers.add_argument("results", type=Path)
    numbers.add_argument("page", type=Path)
    shown = commands.add_parser("page", help="HTML: playing videos, masks and budgets")
    shown.add_argument("results", type=Path)
    shown.add_argument("runs", type=Path)
    shown.add_argument("page", type=Path)
    shown.add_argument("--arms", nargs="+", default=())
    shown.add_argument("--clips", type=int, default=2)
    film = commands.add_parser("film", help="a procedural film")
    film.add_argument("page", type=Path, metavar="film")
    film.add_argument("--shots", type=int, default=24)
    mass = commands.add_parser("mass", help="how concentrated a dense model's attention is")
    mass.add_argument("page", type=Path)
    mass.add_argument("overrides", nargs="*")
    mass.add_argument("--clips", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.command == "mass":
        sys.stdout.write(f"{_write_mass(options)}\n")
        return 0
    if options.command == "film":
        from gossamer.train.study.procedural import write_film

        sys.stdout.write(f"{write_film(options.page, shots=options.shots)}\n")
        return 0
    lines = Results(options.results).required()
    if options.command == "numbers":
        from gossamer.train.study.numbers import write_numbers

        written = write_numbers(lines, options.page, source=str(options.results))
    else:
        from gossamer.train.study.page import write_page

        chosen = {"arms": options.arms, "clips": options.clips}
        written = write_page(lines, options.runs, options.page, **chosen)
    sys.stdout.write(f"{written}\n")
    return 0


def _write_mass(options: argparse.Namespace) -> Path:
    from gossamer.train.config import compose
    from gossamer.train.files import write_atomic
    from gossamer.train.job import Job, make_accelerator
    from gossamer.train.study.mass import mass_curves, tables

    cfg = compose(options.overrides)
    found = mass_curves(Job(cfg, make_accelerator(cfg), []), options.clips)
    write_atomic(options.page, tables(found, list(cfg.evaluation.noise_levels)))
    written: Path = options.page
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
