"""Run scripts in this process, those behind the first watched: `python anonymous_memory.py FILE`.

FILE: JSON of two command lines or more, the first one with models so small that it only loads the libraries,
and of what is typed into each. FILE.RANK gets JSON: `most`, the most bytes of memory that no file has, beside
what is there after the first; `peaks`, those of each; `beside`, for each network that is loaded, and for each
clip that is denoised, the networks that are there: lists of classes, by the class, "denoise" or "end". With
the variable EMULATED_CARD all runs on the emulated device, whose bytes are `card` instead: the most at once.
"""

import gc
import io
import json
import os
import re
import runpy
import sys
import threading
import time
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


class Card:
    """The emulated device of this process, or none. Its memory lies in that of the process."""

    def __init__(self) -> None:
        self._counts: Any = None
        if "EMULATED_CARD" in os.environ:
            from tests.emulated_cuda import loading  # before all that imports torch

            loading.compile_it()
            loading.load()
            from tests.emulated_cuda.device import switch_on

            self._counts = switch_on().functions

    def held(self) -> int:
        """Return the bytes on the device."""
        return self._counts.emulated_allocated() if self._counts else 0

    def forget(self) -> None:
        """Count the most bytes anew."""
        if self._counts:
            self._counts.emulated_forget_most_allocated()

    def maximum(self) -> int:
        """Return the most bytes that were on the device at once."""
        return self._counts.emulated_most_allocated() if self._counts else 0

    def beside(self) -> int:
        """Return the bytes of `anonymous` that are not on the device."""
        before = self.held()
        everything = anonymous()
        return everything - max(before, self.held())  # what is freed meanwhile is nobody's


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
        from blissful_tuner.prompt_rewrite import PromptRewriter
        from checkpoints import filling
        from generation import denoise as denoising

        begin, denoise, read = filling._TensorLoader.__init__, denoising.denoise, PromptRewriter._read

        def read_and_noted(*arguments: Any) -> Any:
            model, tokenizer = read(*arguments)
            self.note(type(model).__name__)
            self._loaded.append(weakref.ref(model))
            return model, tokenizer

        def filled(own: Any, module: Any, *others: Any, **named: Any) -> None:
            begin(own, module, *others, **named)
            if own._device.type != "meta":
                self.note(type(module).__name__)
                self._loaded.append(weakref.ref(module))

        def denoised(*arguments: Any, **named: Any) -> Any:
            self.note("denoise")
            return denoise(*arguments, **named)

        filling._TensorLoader.__init__, denoising.denoise = filled, denoised
        PromptRewriter._read = read_and_noted


def main() -> None:
    """Run all, and write what those behind the first one take."""
    small, *larger, typed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    sys.path[0] = str(ROOT)
    card = Card()
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
    before, maximum, is_done = card.beside(), [0], threading.Event()
    card_before, card_most, peaks = card.held(), [0], list[int]()
    card.forget()

    def watch() -> None:
        while not is_done.wait(PAUSE):
            maximum[0] = max(maximum[0], card.beside())
            card_most[0] = max(card_most[0], card.maximum())  # a training forgets it when it has measured

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for command in larger:
        sys.stdin = io.StringIO(typed)
        maximum[0] = 0
        run(command)
        time.sleep(2 * PAUSE)
        peaks.append(maximum[0] - before)
        gc.collect()
        release_heap()
    is_done.set()
    watcher.join()
    networks.note("end")
    told: dict[str, Any] = {"card": card_most[0] - card_before, "left": card.held() - card_before}
    told = {"most": max(peaks), "peaks": peaks, **told}
    target.write_text(json.dumps({**told, "beside": networks.beside}), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at the interpreter's end


if __name__ == "__main__":
    main()
