"""Start scripts in copies of a process that has loaded the libraries: `python warm_server.py`.

It reads requests from stdin and answers on stdout, a line of JSON each:

    {"run": [SCRIPT, ARGUMENTS...], "folder": ..., "environment": {...}, "out": FILE, "err": FILE}
        -> {"pid": PID}
    {"poll": PID}
        -> {"code": null while it runs, else as subprocess says it}

It ends when stdin ends. Only Linux copies processes safely; elsewhere `tests/commands.py` does without.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# what scripts load, heavy first; loading changes nothing by itself
LOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "accelerate", "av"),
    *("cv2", "ftfy", "matplotlib.figure", "pandas", "psutil", "transformers"),
    *("training.run", "generation.run", "contract.families"),
    *("dataset.caching.work", "dataset.caching.texts", "dataset.batches.starting", "networks.lora_wan"),
    *("dataset.scripts", "dataset.cache.commands", "dataset.caching.indexing", "dataset.caching.loop"),
    *("training.scripts", "generation.scripts", "torch.profiler._cupti_monitor", "einops._torch_specific"),
    *("running.compile", "running.offload.checkpointing", "training.samples", "training.planning.memory"),
    *("generation.sheets", "generation.memory", "blissful_tuner.latent_preview"),
    *sorted(f"{file.parent.name}.family" for file in ROOT.glob("*/family.py")),
    *(f"stable_diffusion.sdxl.{name}" for name in ("options", "family")),
)


def main() -> None:
    """Load, then answer."""
    sys.path[0] = str(ROOT)
    from PIL import Image

    from modules.devices import freeze_libraries

    for name in LOADED:
        with contextlib.suppress(ImportError):  # of an optional package; or the script that needs it says so
            importlib.import_module(name)
    Image.init()  # all formats of files, at the first file in a copy
    gc.collect()
    # copies collect garbage between their phases; what all of them share is left out of it, and counted once
    freeze_libraries()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(request: Mapping[str, Any]) -> None:
    """Run the script as Python does, and end."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["run"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        if code is not None:
            sys.stderr.write(f"{code}\n")
        code = 0 if code is None else 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
