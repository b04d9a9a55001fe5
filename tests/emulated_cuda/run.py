"""Run scripts on the emulated device: `python -m tests.emulated_cuda.run RESULTS < REQUESTS`.

REQUESTS: JSON, a list of {"folder": FOLDER, "command": [SCRIPT, OPTIONS...]}, run one after the other in this
process. RESULTS: a file of JSON, for each {"code", "said", "waits", "calls"}; a wait is {"kind", "operation",
"place", "stack"}. A request may have "counted", functions as MODULE:NAME, whose calls are counted.
"""

import json
import os
import sys
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.emulated_cuda import loading  # before all that imports torch

loading.compile_it()
loading.load()


def count_calls(counted: str, calls: Counter[str]) -> Any:
    """Count the calls of a function, MODULE:NAME, as its module looks it up."""
    module, name = counted.split(":")
    function = getattr(import_module(module), name)

    def count(*arguments: Any, **named: Any) -> Any:
        calls[counted] += 1
        return function(*arguments, **named)

    return patch(f"{module}.{name}", count)


def main() -> None:
    from accelerate.state import AcceleratorState

    from tests.emulated_cuda.device import switch_on
    from tests.faults.messages import QUIET, run_here

    device = switch_on()
    del QUIET["ACCELERATE_USE_CPU"]  # accelerate takes a GPU where torch has one
    results = Path(sys.argv[1])
    done = []
    for request in json.load(sys.stdin):
        AcceleratorState._reset_state(reset_partial_state=True)
        calls: Counter[str] = Counter()
        with device.recording() as waits, ExitStack() as stack:
            for counted in request.get("counted", ()):
                stack.enter_context(count_calls(counted, calls))
            try:
                code, said = run_here(*request["command"], folder=Path(request["folder"]))
            except Exception:
                code, said = -1, traceback.format_exc()
        done.append({"code": code, "said": said, "waits": [asdict(each) for each in waits], "calls": calls})
    results.write_text(json.dumps(done), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
