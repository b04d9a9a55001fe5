"""Run a script of the root twice in this process, the second time watched: `python anonymous_memory.py FILE`.

FILE: JSON of two command lines, the first one with models so small that it only loads the libraries, and of
what is typed into each. FILE.RANK gets JSON: `most`, the most bytes of memory that no file has, beside what
is there after the first; `beside`, for each network that the second loads, and for each clip that it
denoises, the networks that are there: lists of classes, by the class, "denoise" or "end".
"""

import gc
import io
import json
import os
import re
import runpy
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
PAUSE = 0.001  # seconds between two looks


def anonymous() -> int:
    """Return the bytes resident that no file has, such as tensors and the interpreter's objects."""
    found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    return sum(map(int, found)) * 1024


def run(command: list[str]) -> None:
    """Run a script as Python does. Raises SystemExit if it fails."""
    sys.argv = command
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


class Networks:
    """The networks that are loaded, none of which it holds."""

    def __init__(self) -> None:
        self.beside: list[tuple[str, list[str]]] = []
        self._loaded: list[weakref.ref[Any]] = []

    def note(self, what: str) -> None:
        """Note which are there. Without a collection: what circles hold is there."""
        found = (ref() for ref in self._loaded)
        self.beside.append((what, [type(one).__name__ for one in found if one is not None]))

    def watch(self) -> None:
        """Have all loading of files and the denoising loop told here."""
        from generation import denoise as denoising
        from modules.checkpoints import filling

        begin, denoise = filling._Filling.__init__, denoising.denoise

        def filled(own: Any, module: Any, *others: Any) -> None:
            begin(own, module, *others)
            if own._device.type != "meta":
                self.note(type(module).__name__)
                self._loaded.append(weakref.ref(module))

        def denoised(*arguments: Any, **named: Any) -> Any:
            self.note("denoise")
            return denoise(*arguments, **named)

        filling._Filling.__init__, denoising.denoise = filled, denoised


def main() -> None:
    """Run both, and write what the second one takes."""
    small, large, typed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    sys.path[0] = str(ROOT)
    from modules.devices import release_heap

    networks = Networks()
    networks.watch()
    sys.stdin = io.StringIO(typed)
    run(small)
    if "MASTER_PORT" in os.environ:  # that of the first run is in use
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    gc.collect()
    release_heap()
    networks.beside.clear()
    sys.stdin = io.StringIO(typed)
    before, most, is_done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(PAUSE):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run(large)
    is_done.set()
    watcher.join()
    gc.collect()
    networks.note("end")
    target.write_text(json.dumps({"most": most[0] - before, "beside": networks.beside}), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at the interpreter's end


if __name__ == "__main__":
    main()
