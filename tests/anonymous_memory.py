"""Run a script of the root twice in this process, the second time watched: `python anonymous_memory.py FILE`.

FILE: JSON of two command lines, the first one with models so small that it only loads the libraries. The most
bytes of memory that no file has, beside what is there after the first, are written to FILE.RANK.
"""

import gc
import json
import os
import re
import runpy
import sys
import threading
from pathlib import Path

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


def main() -> None:
    """Run both, and write what the second one takes."""
    small, large = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    sys.path[0] = str(ROOT)
    run(small)
    if "MASTER_PORT" in os.environ:  # that of the first run is in use
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    gc.collect()
    before, most, is_done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(PAUSE):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(large)
    is_done.set()
    watcher.join()
    target.write_text(str(most[0] - before), encoding="ascii")
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at the interpreter's end


if __name__ == "__main__":
    main()
