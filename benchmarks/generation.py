"""Measure a denoising step of plain generation against another state of the code.

    python benchmarks/generation.py --against v0.3.0

Both states generate the same latents through their own script, without any feature turned on: the pocket
model and a tiny HunyuanVideo. Each stays in the middle of a generation, in a process of its own, and waits
for its turn. A round is the denoising of each, in alternating order, and gives a ratio of CPU seconds per
step; the median of the ratios is the figure of this pair of processes. For unknown reasons, a process may be
faster or slower than another of the same code, by more than the bar allows: so one pair is not enough, and
the median of several pairs counts. Features that are off must cost nothing: no more than the bar, and not one
more wait of the host for the device, which is counted on torch's meta device.
"""

import argparse
import contextlib
import copy
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
        """Let it denoise ("run") or count ("waits"), and return its answer."""
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
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Print the figures of each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--against", required=True, help="a commit, or the folder of another checkout, which is the baseline"
    )
    parser.add_argument("--pairs", type=int, default=10, help="pairs of processes for each model, at least 2")
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds for each pair")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of each round")
    args = parser.parse_args()
    is_met = True
    with tempfile.TemporaryDirectory() as name, other_tree(args.against, Path(name) / "tree") as other:
        for title, case in write_cases(Path(name), args.steps).items():
            is_met &= compare(title, case, other, Path(name), args.pairs, args.rounds)
    raise SystemExit(not is_met)


@contextlib.contextmanager
def other_tree(against: str, place: Path) -> Iterator[Path]:
    """Yield the folder of the other state; a commit is checked out at `place` for the block."""
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
    """Return the measured cases, whose models are written below `folder`."""
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


def compare(title: str, case: Case, other: Path, folder: Path, pairs: int, rounds: int) -> bool:
    """Measure one case, print its figures, and return whether they meet the bar."""
    measured = [measure_pair(case, other, folder, rounds) for _ in range(pairs)]
    waits = measured[0][0]
    low, middle, high = quartiles([statistics.median(a / b for a, b in seconds) for _, seconds in measured])
    ours, theirs = (
        statistics.median(column)
        for column in zip(*(row for _, seconds in measured for row in seconds), strict=True)
    )
    is_met = middle <= BAR and waits[0] <= waits[1]
    print(f"{title}: {ours * 1e3:.2f} ms of CPU time a step, {theirs * 1e3:.2f} in the other state")
    print(f"  ratio {middle:.4f}, half of {pairs} process pairs between {low:.4f} and {high:.4f}; bar {BAR}")
    print(f"  host waits in {case.script}'s denoising: {waits[0]}, {waits[1]} in the other state")
    print(f"  {'met' if is_met else 'NOT met'}", flush=True)
    return is_met


def measure_pair(
    case: Case, other: Path, folder: Path, rounds: int
) -> tuple[list[int], list[tuple[float, float]]]:
    """Return the host's waits in both states, and the CPU seconds per step of both in each round."""
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
        return waits, seconds
    finally:
        for child in children:
            child.end()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile of two or more values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def work(tree: str, script: str, folder: str, options: Sequence[str]) -> None:
    """Stay in the denoising of one generation as a child process, and answer each line of the input.

    Only what all states of the code have is used.
    """
    sys.path[0] = tree
    import importlib

    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a script prints is not an answer
    from generation import denoise as loop

    module = importlib.import_module(script)
    assert Path(str(module.__file__)).parent == Path(tree), module.__file__
    plain = loop.denoise

    def stay(*args: Any, **named: Any) -> Any:
        given = inspect.signature(plain).bind(*args, **named).arguments
        for line in sys.stdin:
            found = {"run": step_seconds, "waits": count_waits}[line.strip()](plain, given)
            answers.write(f"{json.dumps(found)}\n")
            answers.flush()
        return given["section"].noise

    loop.denoise = stay
    module.main(["--save_path", folder, *options])


def step_seconds(denoise: Any, given: Mapping[str, Any]) -> float:
    """Denoise with these arguments from the start, and return the CPU seconds per step."""
    fresh = {**given, "solver": copy.deepcopy(given["solver"])}  # it remembers earlier steps
    start = time.process_time()
    denoise(**fresh)
    return (time.process_time() - start) / given["solver"].schedule.num_steps


def count_waits(denoise: Any, given: Mapping[str, Any]) -> int:
    """Denoise with these arguments, and return how often the host would wait for a device.

    The device is torch's meta device, whose values cannot be read.
    """
    from unittest.mock import patch

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from generation.denoise import on_device

    meta, waits = torch.device("meta"), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            is_made = (
                func is torch.ops.aten._to_copy.default and named.get("device") == meta != args[0].device
            )
            is_filled = func is torch.ops.aten.copy_.default and args[0].device == meta != args[1].device
            if (is_made and not named.get("non_blocking")) or (is_filled and not any(args[2:])):
                waits.append(func)
            return func(*args, **named)

    dits: dict[int, Any] = {}

    def dit_at(timestep: float) -> Any:
        dit = given["dit_at"](timestep)
        if id(dit) not in dits:
            dits[id(dit)] = copy.deepcopy(dit).to(meta)
        return dits[id(dit)]

    dit_at(1000.0)  # its move is not a step's
    fresh = {
        **given,
        "dit_at": dit_at,
        "section": on_device(given["section"], meta),
        "latents": given["latents"].to(meta),
        "solver": copy.deepcopy(given["solver"]),
        "watchers": (),
    }
    no_autocast = patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    with no_autocast, patch("torch.is_autocast_enabled", lambda *_: False), Copies():
        denoise(**fresh)
    return len(waits)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        work(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        main()
