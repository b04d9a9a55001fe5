"""Run a script and kill this process at a chosen moment: `python run_and_die.py POINT COUNT SCRIPT ARGUMENTS...`.

Only libraries are hooked, never the project: the renames and flushes of the operating system, torch's backward and optimizer
step, safetensors' writer, PyAV's encoder.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = ("mid_write", "before_rename", "after_rename", "mid_epoch", "mid_accumulation", "while_sampling")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def dying_at(count: int, call: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    """`call`, but the process dies before or after its `count`-th use."""
    calls = 0

    def hooked(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and before:
            die()
        result = call(*arguments, **settings)
        if calls == count:
            die()
        return result

    return hooked


def half_written(count: int, save: Callable[..., Any]) -> Callable[..., Any]:
    """A safetensors writer that leaves half a file at its `count`-th use and dies."""
    calls = 0

    def hooked(tensors: Any, filename: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        result = save(tensors, filename, *arguments, **settings)
        if calls == count:
            path = Path(filename)
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size // 2)
            die()
        return result

    return hooked


def place(point: str, count: int) -> None:
    """Hook the library call that `point` stands for."""
    if point in {"before_rename", "after_rename"}:
        os.replace = dying_at(count, os.replace, before=point == "before_rename")
    elif point == "mid_write":
        import safetensors.torch

        safetensors.torch.save_file = half_written(count, safetensors.torch.save_file)
    elif point == "mid_epoch":
        import torch

        torch.optim.AdamW.step = dying_at(count, torch.optim.AdamW.step, before=False)  # type: ignore[method-assign]
    elif point == "mid_accumulation":
        import torch

        torch.Tensor.backward = dying_at(count, torch.Tensor.backward, before=False)  # type: ignore[method-assign]
    elif point == "while_sampling":
        import av

        av.open = _dying_writer(count, av.open)
    else:
        raise SystemExit(f"{point}: not one of {POINTS}")


def _dying_writer(count: int, opened: Callable[..., Any]) -> Callable[..., Any]:
    written = 0

    def hooked(file: Any, mode: Any = None, *arguments: Any, **settings: Any) -> Any:
        nonlocal written
        container = opened(file, mode, *arguments, **settings)
        if mode == "w":
            written += 1
            if written == count:
                die()
        return container

    return hooked


if __name__ == "__main__":
    point, count, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    place(point, count)
    runpy.run_path(script, run_name="__main__")
