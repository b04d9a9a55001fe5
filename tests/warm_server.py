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
import inspect
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# what scripts load, heavy first; loading changes nothing by itself
LOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "accelerate", "av"),
    *("torch.utils.tensorboard", "torch.utils.serialization", "torch.profiler._cupti_monitor"),
    *("cv2", "einops._torch_specific", "ftfy", "matplotlib.figure", "numpy.ctypeslib", "pandas", "psutil"),
    *("pytest", "transformers"),  # the scripts of tests/training import what tests share
    *("protocols.families", "runtime.compile", "runtime.offload.checkpointing"),
    *("generation.run", "generation.scripts", "generation.sheets", "generation.memory"),
    *("blissful_tuner.latent_preview", "data_tools.report.check"),
    *sorted(f"{file.parent.name}.family" for file in ROOT.glob("*/family.py")),
    *(f"stable_diffusion.sdxl.{name}" for name in ("options", "family")),
)
_start_cold: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
ROOMS = ("dataset", "project", "training")  # all of whose modules are loaded


def main() -> None:
    """Load, then answer."""
    sys.path[0] = str(ROOT)
    from PIL import Image

    from modules.devices import freeze_libraries

    for name in (*LOADED, *_find_modules()):
        with contextlib.suppress(ImportError):  # of an optional package; or the script that needs it says so
            importlib.import_module(name)
    # the import answers --help and the like for the program that runs: each copy does that itself
    assert "modules.interpreter" not in sys.modules
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


def _find_modules() -> Iterator[str]:
    """Yield the names of all modules of ROOMS."""
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _become(request: Mapping[str, Any]) -> NoReturn:
    """Run the script as Python does, and end."""
    files = [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for name in ("out", "err")),
    ]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    subprocess.Popen._execute_child = _start_warm  # type: ignore[attr-defined]
    _run(request["run"], request["folder"], request["environment"])


def _run(words: Sequence[str], folder: str | Path, environment: Mapping[str, str]) -> NoReturn:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*words]
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


def _start_warm(process: Any, *given: Any) -> None:
    """Start a program as `subprocess.Popen._execute_child` does: a script of ours as a copy of this process.

    What this process has loaded is loaded there; what it has set is set back.
    """
    asked = inspect.signature(_start_cold).bind(process, *given).arguments
    words = asked["args"]
    is_script = isinstance(words, list) and len(words) > 1 and str(words[0]) == sys.executable
    if not is_script or asked["shell"] or asked["pass_fds"] or Path(words[1]).parent != ROOT:
        _start_cold(process, *given)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of libraries, from Python 3.12 on
        process.pid = os.fork()
    process._child_created = True
    if process.pid:
        process._close_pipe_fds(*pipes)
        return
    for number, file in enumerate((pipes[0], pipes[3], pipes[5])):  # -1 for those of this process
        if file != -1:
            os.dup2(file, number)
    os.closerange(3, 256)
    # those of this process may have been files: what they know of them is no longer true
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    if asked["start_new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()
    logging.getLogger().handlers.clear()
    sys.modules.pop("modules.interpreter", None)
    _run([str(word) for word in words[1:]], asked["cwd"] or Path.cwd(), asked["env"] or dict(os.environ))


if __name__ == "__main__":
    main()
