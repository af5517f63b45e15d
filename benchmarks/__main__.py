"""`python benchmarks key=value ...` is `gossamer bench key=value ...`."""

import sys

from gossamer.train.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
