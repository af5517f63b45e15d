"""`accelerate launch -m gossamer.train key=value ...`: the verb train in every process."""

import sys

from gossamer.train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
