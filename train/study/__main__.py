"""`python -m gossamer.train.study numbers RESULTS.jsonl PAGE.md`: what a study found, as a page."""

import argparse
import sys
from pathlib import Path

from gossamer.train.refusal import Refusal
from gossamer.train.study.record import Results


def main(arguments: list[str]) -> int:
    """Write the page and return 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.train.study")
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = commands.add_parser("numbers", help="Markdown tables, verdicts and a Pareto plot")
    numbers.add_argument("results", type=Path)
    numbers.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    try:
        from gossamer.train.study.numbers import write_numbers

        lines = Results(options.results).required()
        written = write_numbers(lines, options.page, source=str(options.results))
    except Refusal as refusal:
        sys.stderr.write(f"error: {refusal}\n")
        return 2
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
