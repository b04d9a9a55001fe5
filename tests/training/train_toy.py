"""Train the toy family in a process of its own: `python train_toy.py FOLDER ARGUMENTS...`.

With TOY_EXPERTS=1 the model has two transformers.
With TOY_STOP_AT=n in the environment, the first process is asked to end at its n-th micro-batch; with
TOY_WHOLE_DIT=1 the DiT itself learns; with TOY_PAGE=1 it writes its page. With TOY_KILL_AT=n the process
kills itself when it has written its part of the n-th state.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from protocols.rules import ONE_EXPERT  # noqa: E402  # found from here on
from tests.training.toy import TWO_EXPERTS, ToyFamily, toy_options  # noqa: E402
from training.run import train_network  # noqa: E402


def ask_to_end(passes: int) -> None:
    if passes == int(os.environ.get("TOY_STOP_AT", "-1")) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)


def kill_in_state(number: int) -> None:
    from training.saving import split_model

    write, calls = split_model.save, []

    def save(*given: Any, **named: Any) -> None:
        write(*given, **named)
        calls.append(given)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    split_model.save = save


if __name__ == "__main__":
    if "TOY_KILL_AT" in os.environ:
        kill_in_state(int(os.environ["TOY_KILL_AT"]))
    has_page = "TOY_PAGE" in os.environ
    options = toy_options(
        Path(sys.argv[1]), *sys.argv[2:], full_dit="TOY_WHOLE_DIT" in os.environ, has_page=has_page
    )
    experts = TWO_EXPERTS if "TOY_EXPERTS" in os.environ else ONE_EXPERT
    raise SystemExit(train_network(ToyFamily(watch=ask_to_end, experts=experts), options))
