"""Compare what a cache can be kept in: single files and shards (SQLite).

    python benchmarks/cache_formats.py --folder /path/on/the/disk --entries 20000 --size_kb 64
    python benchmarks/cache_formats.py --folder /path/on/the/disk --entries 200000 --size_kb 2 --forms shards

Every form holds the same safetensors files. Printed per form: seconds to write all (as caching does, with
the end of the run), files and megabytes on the disk, seconds to open it and list all names, and microseconds
to read an entry in random order, whole and its header alone. The pages are in the system's cache, so reading
measures software, not the disk.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.cache.shards import ShardStore
from dataset.cache.store import SingleFiles
from dataset.cache_files import CacheStore

FORMS = {"files": SingleFiles, "shards": ShardStore}
READS = 10_000


def main() -> None:
    """Print the figures of each form of cache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed at the end")
    parser.add_argument("--entries", type=int, default=20_000)
    parser.add_argument("--size_kb", type=int, default=64, help="of an entry")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    args = parser.parse_args()
    for form in args.forms:
        args.folder.mkdir(parents=True)
        try:
            print(f"{form:7s} {measure(FORMS[form], args.folder, args.entries, args.size_kb)}", flush=True)
        finally:
            shutil.rmtree(args.folder)


def measure(form: type[SingleFiles] | type[ShardStore], folder: Path, entries: int, size_kb: int) -> str:
    """Return a line of figures for one form of cache."""
    names = [f"clip_{number:08d}_00000-017_0832x0480_wan.safetensors" for number in range(entries)]
    random.Random(1).shuffle(names)
    latents = [torch.full((size_kb * 1000,), number, dtype=torch.uint8) for number in range(251)]
    store: CacheStore = form(folder)
    start = time.perf_counter()
    for number, name in enumerate(names):
        store.write(name, {"latents_1x1x1_uint8": latents[number % 251]}, {"architecture": "wan"})
    store.close(is_last=True)
    writing = time.perf_counter() - start
    files = list(folder.iterdir())
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in files) / 1e6
    start = time.perf_counter()
    store = form(folder)
    assert len(store.names()) == entries
    opening = time.perf_counter() - start
    chosen = random.Random(0).choices(names, k=READS)
    times = []
    for is_full in (True, False):
        start = time.perf_counter()
        for name in chosen:
            store.read(name, is_full)
        times.append((time.perf_counter() - start) / READS * 1e6)
    return (
        f"{entries} x {size_kb} KB written in {writing:6.2f} s; {len(files)} files, {size:.0f} MB; opened in "
        f"{opening:.3f} s; read in {times[0]:.0f} us, its header in {times[1]:.0f} us"
    )


if __name__ == "__main__":
    main()
