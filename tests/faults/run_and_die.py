"""Run a script and kill this process at a chosen moment: `python run_and_die.py POINT COUNT SCRIPT
ARGUMENTS...`.

At the COUNT-th use of what POINT stands for the process dies, as by SIGKILL. `python run_and_die.py count
FILE SCRIPT ...` kills nothing and writes to FILE how often each point was passed, so that a test can choose a
COUNT that will come.

Only libraries are hooked, never the project: the renames of the operating system, torch's backward, files
that Python writes itself, PyAV's muxer.
"""

import atexit
import json
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = ("mid_write", "before_rename", "mid_accumulation", "while_sampling")

IsTime = Callable[[], bool]  # told that the point is passed; whether the process dies now


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def dying(call: Callable[..., Any], is_time: IsTime, *, before: bool = False) -> Callable[..., Any]:
    """`call`, but the process dies before or after the use that it is time for."""

    def hooked(*arguments: Any, **settings: Any) -> Any:
        now = is_time()
        if now and before:
            die()
        result = call(*arguments, **settings)
        if now:
            die()
        return result

    return hooked


class DyingFile:
    """A file that is being written: the process dies when half of what a call writes is in it."""

    def __init__(self, file: Any, is_time: IsTime) -> None:
        self._file, self._is_time = file, is_time

    def write(self, data: Any) -> int:
        if self._is_time():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            die()
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "DyingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class DyingContainer:
    """A video that is being written: the process dies when some of its packets are in the file and its end is
    not.
    """

    def __init__(self, container: Any, is_time: IsTime) -> None:
        self._container, self._is_time = container, is_time

    def mux(self, packets: Any) -> None:
        self._container.mux(packets)
        if self._is_time():
            die()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def __enter__(self) -> "DyingContainer":
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()


def place(point: str, is_time: IsTime) -> None:
    """Hook the library call that `point` stands for."""
    if point == "before_rename":
        from modules import atomic_write

        atomic_write.replace_file = dying(atomic_write.replace_file, is_time, before=True)
    elif point == "mid_write":
        opened_file = Path.open

        def hooked_file(path: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
            file = opened_file(path, mode, *arguments, **settings)
            return DyingFile(file, is_time) if mode == "wb" else file

        Path.open = hooked_file  # type: ignore[method-assign, assignment]
    elif point == "mid_accumulation":
        import torch

        torch.Tensor.backward = dying(torch.Tensor.backward, is_time)  # type: ignore[method-assign]
    elif point == "while_sampling":
        import av

        opened = av.open

        def hooked(file: Any, mode: Any = None, *arguments: Any, **settings: Any) -> Any:
            container = opened(file, mode, *arguments, **settings)
            return DyingContainer(container, is_time) if mode == "w" else container

        av.open = hooked
    else:
        raise SystemExit(f"{point}: not one of {POINTS}")


def counting(passed: Counter[str], point: str, last: int | None) -> IsTime:
    """Count how often a point is passed; it is time at the `last`."""

    def is_time() -> bool:
        passed[point] += 1
        return passed[point] == last

    return is_time


def main() -> None:
    point, count, script = sys.argv[1], sys.argv[2], sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    passed: Counter[str] = Counter(dict.fromkeys(POINTS, 0))
    if point == "count":
        for each in POINTS:
            place(each, counting(passed, each, None))
        atexit.register(lambda: Path(count).write_text(json.dumps(passed), encoding="utf-8"))
    else:
        place(point, counting(passed, point, int(count)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
