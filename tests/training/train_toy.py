"""Train the toy family in a process of its own: `python train_toy.py FOLDER ARGUMENTS...`."""

import sys
from pathlib import Path

from tests.training.toy import ToyFamily, toy_options
from training.run import train_network

if __name__ == "__main__":
    raise SystemExit(train_network(ToyFamily(), toy_options(Path(sys.argv[1]), *sys.argv[2:])))
