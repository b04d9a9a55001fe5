"""Train the toy family in a process of its own: `python train_toy.py FOLDER ARGUMENTS...`.

With TOY_EXPERTS=1 the model has two transformers.
With TOY_STOP_AT=n in the environment, the first process is asked to end at its n-th micro-batch; with
TOY_WHOLE_DIT=1 the DiT itself learns; with TOY_PAGE=1 it writes its page.
"""

import os
import signal
import sys
from pathlib import Path

from modules.contract.rules import ONE_EXPERT
from tests.training.toy import TWO_EXPERTS, ToyFamily, toy_options
from training.run import train_network


def ask_to_end(passes: int) -> None:
    if passes == int(os.environ.get("TOY_STOP_AT", "-1")) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    has_page = "TOY_PAGE" in os.environ
    options = toy_options(
        Path(sys.argv[1]), *sys.argv[2:], whole_dit="TOY_WHOLE_DIT" in os.environ, has_page=has_page
    )
    experts = TWO_EXPERTS if "TOY_EXPERTS" in os.environ else ONE_EXPERT
    raise SystemExit(train_network(ToyFamily(watch=ask_to_end, experts=experts), options))
