"""Measure a denoising step of plain generation against another state of the code:

    python benchmarks/generation.py --against v0.3.0

Both states make the same latents through their own script, with no feature turned on: the pocket model and a
tiny HunyuanVideo. Each runs in a process of its own that keeps waiting for its turn; a round is one
generation of each, in alternating order, and gives a ratio of CPU seconds per step. The figure is the median
of the ratios. Features that are off must cost nothing: not more than the bar, and not one more wait of the
host for the device, which is counted on torch's meta device.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BAR = 1.01
SETTINGS = ["--seed", "1", "--device", "cpu", "--output_type", "latent", "--no_metadata"]
# sizes of the tiny HunyuanVideo: as deep as the tests', wide enough that a step is not all Python
WIDE = {"dim": 256, "ffn_dim": 1024, "num_heads": 2}


@dataclass(frozen=True)
class Case:
    """One model: the script that runs it and its options."""

    script: str
    options: tuple[str, ...]


class Child:
    """One state of the code at work on one case, in a process of its own."""

    def __init__(self, tree: Path, case: Case, folder: Path) -> None:
        words = [str(tree), case.script, str(folder), *case.options]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def ask(self, word: str) -> Any:
        """Have it make one generation ("run") or count ("waits"); return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"a generation failed:\n{self._process.communicate()[1][-4000:]}")
        return json.loads(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", required=True, help="a commit, or the folder of another checkout, which is the baseline"
    )
    parser.add_argument("--rounds", type=int, default=24, help="number of rounds for each model")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of each generation")
    args = parser.parse_args()
    is_met = True
    with tempfile.TemporaryDirectory() as name, other_tree(args.against, Path(name) / "tree") as other:
        for title, case in write_cases(Path(name), args.steps).items():
            is_met &= compare(title, case, other, Path(name), args.rounds)
    raise SystemExit(not is_met)


@contextlib.contextmanager
def other_tree(against: str, place: Path) -> Iterator[Path]:
    """Yield the folder of the other state; a commit is checked out at `place` for the time of the block."""
    if Path(against).is_dir():
        yield Path(against).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(place), against], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def write_cases(folder: Path, steps: int) -> dict[str, Case]:
    """Return what is measured; the models of the tests are written below `folder`."""
    sys.path[0] = str(ROOT)
    from pocket.measure import CLIP, POCKET, model_options
    from tests.tiny.hunyuan import write_tiny_hunyuan

    asked = ("--prompt", "a red circle moving left", "--infer_steps", str(steps), *SETTINGS)
    tiny = write_tiny_hunyuan(folder / "hunyuan", **WIDE).models
    size = ("--video_size", "64", "64", "--video_length", "17")
    return {
        "pocket": Case("wan_generate_video", (*model_options(POCKET), *CLIP, *asked)),
        "HunyuanVideo, tiny": Case("hv_generate_video", (*tiny, *size, *asked)),
    }


def compare(title: str, case: Case, other: Path, folder: Path, rounds: int) -> bool:
    """Measure one case, print its figures, and return whether they are good enough."""
    children = [Child(tree, case, folder / f"{index}") for index, tree in enumerate((ROOT, other))]
    try:
        waits = [child.ask("waits") for child in children]
        for child in children:  # warm up
            child.ask("run")
        seconds: list[tuple[float, float]] = []
        for round_index in range(rounds):
            order = (0, 1) if round_index % 2 == 0 else (1, 0)
            found = {index: children[index].ask("run") for index in order}
            seconds.append((found[0], found[1]))
    finally:
        for child in children:
            child.end()
    ratios = [ours / theirs for ours, theirs in seconds]
    low, middle, high = quartiles(ratios)
    ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
    is_met = middle <= BAR and waits[0] <= waits[1]
    print(f"{title}: {ours * 1e3:.2f} ms of CPU time a step, {theirs * 1e3:.2f} in the other state")
    print(f"  ratio {middle:.4f}, half of {rounds} rounds between {low:.4f} and {high:.4f}; bar {BAR}")
    print(f"  host waits in {case.script}'s denoising: {waits[0]}, {waits[1]} in the other state")
    print(f"  {'met' if is_met else 'NOT met'}", flush=True)
    return is_met


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile of two or more values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def work(tree: str, script: str, folder: str, options: Sequence[str]) -> None:
    """Be a child: answer each line of the standard input. Only what all states of the code have is used."""
    sys.path[0] = tree
    import importlib
    import shutil

    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a script prints is not an answer
    from generation import sections

    module = importlib.import_module(script)
    assert Path(str(module.__file__)).parent == Path(tree), module.__file__
    plain, measure = sections.denoise, {"run": timed, "waits": count_waits}
    for line in sys.stdin:
        found: list[float] = []
        sections.denoise = measure[line.strip()](plain, found)
        module.main(["--save_path", folder, *options])
        shutil.rmtree(folder)
        answers.write(f"{json.dumps(found[0])}\n")
        answers.flush()


def timed(denoise: Any, found: list[float]) -> Any:
    """Return `denoise`, which notes its CPU seconds per step."""
    import inspect
    import time

    def measured(*args: Any, **named: Any) -> Any:
        given = inspect.signature(denoise).bind(*args, **named).arguments
        start = time.process_time()
        made = denoise(*args, **named)
        found.append((time.process_time() - start) / given["solver"].schedule.num_steps)
        return made

    return measured


def count_waits(denoise: Any, found: list[float]) -> Any:
    """Return `denoise`, which notes how often the host would wait for a device.

    The device is torch's meta device, which lets nobody read its numbers.
    """
    import copy
    import inspect
    from dataclasses import replace
    from unittest.mock import patch

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from generation.sections import on_device

    meta = torch.device("meta")

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if func is torch.ops.aten._to_copy.default and named.get("device") == meta != args[0].device:
                found[0] += not named.get("non_blocking")
            if func is torch.ops.aten.copy_.default and args[0].device == meta != args[1].device:
                found[0] += not any(args[2:])
            return func(*args, **named)

    def counted(*args: Any, **named: Any) -> Any:
        found.append(0)
        given = inspect.signature(denoise).bind(*args, **named).arguments
        start = replace(given["start"], latents=given["start"].latents.to(meta))
        moved = {**given, "section": on_device(given["section"], meta), "start": start, "watchers": ()}
        dits: dict[int, Any] = {}

        def dit_at(timestep: float) -> Any:
            dit = given["dit_at"](timestep)
            if id(dit) not in dits:
                dits[id(dit)] = copy.deepcopy(dit).to(meta)
            return dits[id(dit)]

        dit_at(1000.0)  # its move is not a step's
        no_autocast = patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
        with no_autocast, patch("torch.is_autocast_enabled", lambda *_: False), Copies():
            denoise(**{**moved, "dit_at": dit_at})
        return given["section"].noise

    return counted


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        main()
