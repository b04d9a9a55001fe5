"""Measure what a large dataset costs, with 10,000, 100,000 and 1,000,000 items.

    python benchmarks/dataset_scale.py [items ...] [--folder FOLDER] [--only start ...] [--form shards]

Measured are starting a training, planning, --check, and caching that finds everything valid; printed are the
fit a + b * items of each, and its ratio to a floor. The items are hard links to a few tiny clips that have
been cached for real, so that a million takes 100 MB and a few minutes to make; they are removed afterwards.
Each measurement is a process of its own. Memory is its peak above what it needs after the imports. The floor
lists both folders with os.scandir and asks for the size of the files that have to be looked at. With --form
shards a million entries are written, 6 GB.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import process_memory  # noqa: E402

SIZES = (10_000, 100_000, 1_000_000)
MAX_LINKS = 60_000  # of a file: ext4 allows 65,000
FRAMES = 5
START_SECONDS, START_MICROSECONDS, START_BYTES = 10.0, 5.0, 1024.0  # the bars
CONFIG = """[general]
resolution = [32, 32]
caption_extension = ".txt"
batch_size = 1
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
target_frames = [5]
cache_format = "{form}"
"""
# name: which files a floor has to ask for their sizes
PHASES = {
    "start": "",
    "latents": "clips .mp4, cache latents",
    "texts": "clips .txt, cache texts",
    "check_latents": "clips .mp4, cache latents",
    "check_texts": "clips .txt, cache texts",
    "check_training": "clips .mp4, clips .txt, cache latents, cache texts",
}
MAX_READ = 100_000  # check_training reads every file


def make_items(folder: Path, count: int, form: str = "files") -> Path:
    """Make `count` clips with captions and caches; return the dataset file."""
    from dataset.cache.shards import ShardStore
    from dataset.caching.loop import cache_media, cache_texts
    from dataset.config import load_dataset_config
    from tests.dataset.making import make_clip
    from tests.dataset.toy_family import ToyFamily, options

    clips, cache = folder / "clips", folder / "cache"
    clips.mkdir(parents=True)
    path = folder / "dataset.toml"
    path.write_text(CONFIG.format(folder=folder.as_posix(), form=form), encoding="utf-8")
    real = min(count, count // MAX_LINKS + 1)
    for index in range(real):
        make_clip(clips / f"clip_{index:08d}.mp4", FRAMES)
        (clips / f"clip_{index:08d}.txt").write_text(f"clip number {index}, seen from the side", "utf-8")
    config = load_dataset_config(path)
    cache_media(ToyFamily(), config, options())
    cache_texts(ToyFamily(), config, options())
    for place in (clips, cache) if form == "files" else (clips,):
        names = sorted(os.listdir(place))
        for index in range(real, count):
            source, stem = f"clip_{index % real:08d}", f"clip_{index:08d}"
            for name in names:
                if name.startswith(source):
                    os.link(place / name, f"{place}/{stem}{name[len(source) :]}")
    if form == "shards":
        store = ShardStore(cache)
        data = {name: store.read_bytes(name) for name in store.names()}
        for index in range(real, count):
            source, stem = f"clip_{index % real:08d}", f"clip_{index:08d}"
            for name in data:
                if name.startswith(source):
                    store.write_bytes(stem + name[len(source) :], data[name])
        store.close(is_last=True)
    return path


def measure_floor(folder: Path, what: str) -> float:
    """List both folders and ask for file sizes; return CPU seconds. `what` is as in PHASES."""
    ends = {".mp4": ".mp4", ".txt": ".txt", "latents": "_toy.safetensors", "texts": "_te.safetensors"}
    wanted = [part.split() for part in what.split(", ") if part]
    begin = time.process_time()
    for place in ("clips", "cache") if wanted else ("cache",):
        suffixes = tuple(ends[end] for where, end in wanted if where == place)
        with os.scandir(folder / place) as entries:
            names = [entry.name for entry in entries]
        for name in names if suffixes else ():
            if name.endswith(suffixes):
                os.stat(f"{folder}/{place}/{name}")  # noqa: PTH116  # the floor: no Path
    return time.process_time() - begin


def start(path: Path) -> None:
    """Do what training does from its options to its first batch, without a model."""
    from dataset.batches.checks import check_channels
    from dataset.batches.finding import find_items, require_items
    from dataset.batches.order import BatchOrder, split_validation
    from dataset.config import load_dataset_config
    from tests.dataset.toy_family import LATENT
    from tests.training.toy import toy_options
    from training.data.feed import BatchSources, Feed, NoiseSampler
    from training.planning.memory import largest_batch
    from training.resuming import epoch_digest
    from training.steps import StepPlan

    found = require_items(find_items(load_dataset_config(path), "toy", LATENT, frozenset({"t5"})))
    check_channels(found, LATENT, commands=_commands())
    training, validation = split_validation(found, 0.01)
    order = BatchOrder(training, 0)
    plan = StepPlan(
        order.num_batches, data_parallel_size=1, accumulation_steps=1, total_steps=order.num_batches
    )
    epoch_digest(order)
    largest_batch(training)
    noise_sampler = NoiseSampler(toy_options(path.parent).timesteps, 0)
    feed = Feed(order, BatchSources(LATENT), noise_sampler, plan, process=0, workers=2)
    micro_batches = feed.start(0, 0)
    assert next(micro_batches).number == 0
    micro_batches.close()
    assert len(training) + len(validation) == len(found)


def _commands() -> "object":
    from dataset.batches.items import NO_COMMANDS

    return NO_COMMANDS


def plan(path: Path, phase: str) -> None:
    """Run caching or a check over items that are all valid."""
    from data_tools.report.check import check_caching, check_training
    from dataset.caching.loop import cache_media, cache_texts
    from dataset.config import load_dataset_config
    from tests.dataset.toy_family import LATENT, ToyFamily, options

    config, family = load_dataset_config(path), ToyFamily()
    if phase in {"latents", "texts"}:
        report = (cache_media if phase == "latents" else cache_texts)(family, config, options())
        assert report.reused, report
        assert (report.written, report.removed) == (0, 0), report
        return
    checks: dict[str, Callable[[], object]] = {
        "check_latents": lambda: check_caching(family, config, 1, False),
        "check_texts": lambda: check_caching(family, config, 1, False, parts=["texts"]),
        "check_training": lambda: check_training(config, "toy", LATENT, text_keys=frozenset({"t5"})),
    }
    result = checks[phase]()
    assert not result.exit_code, result.lines  # type: ignore[attr-defined]


def measure(path: Path, phase: str) -> None:
    """Print what a phase costs; runs in a process of its own."""
    import data_tools.report.check  # noqa: F401
    import training.planning.memory  # noqa: F401
    from tests.dataset.toy_family import ToyFamily  # noqa: F401
    from tests.training.toy import toy_options  # noqa: F401

    measure_floor(path.parent, PHASES[phase])  # warms the system's cache
    floor = measure_floor(path.parent, PHASES[phase])
    before, begin, cpu = process_memory.start_of_peak(), time.monotonic(), time.process_time()
    if phase == "start":
        start(path)
    else:
        plan(path, phase)
    numbers = {"wall": time.monotonic() - begin, "cpu": time.process_time() - cpu, "floor": floor}
    numbers["workers"] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    sys.stdout.write(json.dumps(numbers | {"peak": process_memory.peak() - before}) + "\n")


def run(path: Path, phase: str) -> dict[str, float]:
    """Measure a phase; `process` is the seconds from exec to the end, without measuring the floor."""
    begin = time.monotonic()
    command = [sys.executable, __file__, "--measure", phase, "--folder", str(path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"{phase} failed")
    numbers: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return numbers | {"process": time.monotonic() - begin}


def fit(counts: list[int], values: list[float]) -> tuple[float, float]:
    """Return a and b of a + b * count, which the smallest and the largest count give if there are two."""
    first, last = min(counts), max(counts)
    at = dict(zip(counts, values, strict=True))
    slope = (at[last] - at[first]) / (last - first) if last > first else at[first] / first
    return at[first] - slope * first if last > first else 0.0, slope


def report(phase: str, rows: dict[int, dict[str, float]]) -> None:
    """Print the fits of a phase."""
    counts = sorted(rows)
    parts = []
    for name in ("wall", "cpu"):
        base, slope = fit(counts, [rows[count][name] for count in counts])
        parts.append(f"{name} {base:.2f} s + {1e6 * slope:.2f} us an item")
    last = rows[counts[-1]]
    peak = fit(counts, [rows[count]["peak"] for count in counts])
    ratio = last["cpu"] / last["floor"]
    print(
        f"{phase:>15}: {', '.join(parts)}; peak {peak[0] / 1e6:.0f} MB + {peak[1]:.0f} bytes an item; "
        f"{ratio:.1f} times the floor, {1e6 * last['floor'] / counts[-1]:.2f} us an item"
    )
    if phase == "start":
        is_met = all(
            row["process"] <= START_SECONDS + START_MICROSECONDS * 1e-6 * count
            and row["peak"] <= max(START_BYTES * count, 64e6)
            for count, row in rows.items()
        )
        print(
            f"{'':>15}  bars {START_SECONDS:g} s + {START_MICROSECONDS:g} us, {START_BYTES:g} bytes an item: "
            f"{'met' if is_met else 'NOT met'}"
        )


def main() -> None:
    """Make the items, and print the costs of each phase and their fits."""
    process_memory.require_linux()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", nargs="*", type=int, default=SIZES)
    parser.add_argument("--folder", type=Path, default=None, help="where items are made (and removed)")
    parser.add_argument("--form", default="files", choices=("files", "shards"))
    parser.add_argument("--keep", action="store_true", help="leave the items there, or use those there")
    parser.add_argument("--only", nargs="*", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--read_all", action="store_true", help="check_training with more than 100,000 items")
    parser.add_argument("--measure", choices=list(PHASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.folder, args.measure)
        return
    rows: dict[str, dict[int, dict[str, float]]] = {phase: {} for phase in args.only}
    for count in args.items:
        parent = args.folder or Path(tempfile.gettempdir())
        folder = parent / f"dataset_scale_{count}"
        begin = time.monotonic()
        path = folder / "dataset.toml"
        if not (args.keep and path.exists()):
            make_items(folder, count, args.form)
        print(f"{count} items, made in {time.monotonic() - begin:.0f} s")
        try:
            for phase in args.only:
                if phase == "check_training" and count > MAX_READ and not args.read_all:
                    continue
                rows[phase][count] = numbers = run(path, phase)
                said = ", ".join(
                    f"{name} {number:.2f} s" for name, number in numbers.items() if name != "peak"
                )
                print(f"{phase:>15}: {said}, peak {numbers['peak'] / 1e6:.0f} MB", flush=True)
        finally:
            if not args.keep:
                shutil.rmtree(folder)
    for phase, found in rows.items():
        if found:
            report(phase, found)


if __name__ == "__main__":
    main()
