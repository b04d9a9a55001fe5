"""What starting training costs for each item in CPU time: finding the caches, ordering an epoch; and the
memory that stays.

python benchmarks/dataset_start.py [items ...]

Caches are empty files with real names, as none is opened before its turn comes. The baseline lists the same
folder with os.scandir and sorts the names.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import process_memory

SIZES = (10_000, 100_000)
TIME_BAR, MEMORY_BAR = 15.0, 800.0  # microseconds and bytes an item
TAG = "wan"


def write_caches(folder: Path, count: int) -> Path:
    """Empty cache files of `count` clips, one item each, and the dataset file."""
    cache = folder / "cache"
    cache.mkdir()
    for index in range(count):
        size = ("0832x0480", "0480x0832", "0624x0624")[index % 3]
        for name in (f"clip_{index:08d}_00000-081_{size}_{TAG}", f"clip_{index:08d}_{TAG}_te"):
            (cache / f"{name}.safetensors").touch()
    path, here = folder / "dataset.toml", folder.as_posix()
    path.write_text(
        "[general]\nresolution = [832, 480]\nbatch_size = 1\nenable_bucket = true\n"
        f'[[datasets]]\nvideo_directory = "{here}/clips"\ncache_directory = "{here}/cache"\ntarget_frames = '
        "[81]\n",
        encoding="utf-8",
    )
    return path


def list_names(folder: Path) -> list[str]:
    """The baseline: all names of a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def measure(path: Path) -> None:
    """Print seconds of the baseline, seconds of starting, and bytes that stay. For a process of its own."""
    from dataset.batches.finding import find_items, require_items, split_validation
    from dataset.batches.order import BatchOrder
    from dataset.config import load_dataset_config
    from modules.contract.family import LatentSpec
    from training.data.feed import MicroBatches, Randomness
    from training.planning.memory import largest_batch
    from training.resuming import epoch_digest

    latent = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)
    config = load_dataset_config(path)
    list_names(path.parent / "cache")  # warms the file system's cache
    begin = time.process_time()
    list_names(path.parent / "cache")
    baseline = time.process_time() - begin
    before = process_memory.memory("RssAnon")
    begin = time.process_time()
    found = require_items(find_items(config, TAG, latent))
    items, _ = split_validation(found, 0.0)
    order = BatchOrder(items, 0)
    digest = epoch_digest(order)
    largest_batch(items)
    feed = MicroBatches(order, latent, Randomness(None, 0), None)  # type: ignore[arg-type]  # nothing is drawn
    feed.open_epoch(0)
    seconds = time.process_time() - begin
    print(baseline, seconds, process_memory.memory("RssAnon") - before, len(items), digest)


def main() -> None:
    process_memory.require_linux()
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
        return
    worst_time = worst_memory = 0.0
    for count in [int(text) for text in sys.argv[1:]] or SIZES:
        with tempfile.TemporaryDirectory() as name:
            path = write_caches(Path(name), count)
            command = [sys.executable, __file__, "--measure", str(path)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
            runs = [
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                for _ in range(3)
            ]
            numbers = [[float(word) for word in run.stdout.split()[:3]] for run in runs]
            baseline, seconds, kept = (sorted(column)[1] for column in zip(*numbers, strict=True))
        microseconds, size = 1e6 * seconds / count, kept / count
        worst_time, worst_memory = max(worst_time, microseconds), max(worst_memory, size)
        ratio = seconds / baseline
        listing = f"{1e6 * baseline / count:.2f} us for scandir and sort"
        print(
            f"{count:>9} items: {microseconds:6.2f} us and {size:6.0f} bytes an item; {ratio:.1f} times "
            f"{listing}"
        )
    is_met = worst_time <= TIME_BAR and worst_memory <= MEMORY_BAR
    print(f"bar {TIME_BAR:g} us, {MEMORY_BAR:g} bytes: {'met' if is_met else 'NOT met'}")


if __name__ == "__main__":
    main()
