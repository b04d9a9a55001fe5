"""Compare what a cache can be kept in: single files, shards (plain tars) and Lance.

    python benchmarks/cache_formats.py --folder /path/on/the/disk --entries 2000 --size_kb 300

Every form holds the same safetensors files of random bytes. Printed per form: megabytes a second written
(whole writers, flushed), files and megabytes on the disk, the seconds to open it, and entries a second that
are read in random order, one after another and in batches of 64. Reading makes tensors and, in shards,
compares checksums. The pages are in the system's cache, so reading measures software, not the disk.
Lance needs `pip install pylance`, without it that form is left out.
"""

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.cache.files import read_entry
from dataset.cache.packing import unpack
from dataset.cache.shards import ShardStore
from modules.atomic_write import write_bytes
from modules.checkpoints.writing import safetensors_bytes

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="is made, and removed at the end")
    parser.add_argument("--entries", type=int, default=2000)
    parser.add_argument("--size_kb", type=int, nargs="+", default=[10, 300, 2000], help="of an entry")
    parser.add_argument("--reads", type=int, default=2000)
    args = parser.parse_args()
    for size_kb in args.size_kb:
        entries = min(args.entries, 1_500_000 // size_kb)
        for form in (single_files, shards, lance_table):
            args.folder.mkdir(parents=True)
            try:
                said = measure(form, args.folder, entries, size_kb, args.reads)
            except ImportError as error:
                said = f"{form.__name__} is left out: {error}"
            finally:
                shutil.rmtree(args.folder)
            print(f"{size_kb:6d} KB {entries:6d} {said}", flush=True)


def data_of(number: int, size_kb: int) -> bytes:
    """Return the bytes of a cache file of one tensor."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randint(0, 256, (size_kb * 1000,), dtype=torch.uint8, generator=generator)
    return safetensors_bytes({"latents_1x1x1_uint8": latents}, {"architecture": "wan", "number": str(number)})


def name_of(number: int) -> str:
    """Return the name of an entry."""
    return f"clip_{number:08d}_00000-017_0832x0480_wan.safetensors"


Reader = Callable[[Sequence[str]], list[Any]]


def single_files(folder: Path, entries: int, size_kb: int) -> Callable[[], Reader]:
    """Write a file for each entry."""
    for number in range(entries):
        write_bytes(folder / name_of(number), data_of(number, size_kb))
    return lambda: lambda names: [read_entry(folder / name) for name in names]


def shards(folder: Path, entries: int, size_kb: int) -> Callable[[], Reader]:
    """Write shards, and merge them as the end of caching does."""
    store = ShardStore(folder)
    for number in range(entries):
        store.write_bytes(name_of(number), data_of(number, size_kb))
    store.settle()

    def opened() -> Reader:
        store = ShardStore(folder)
        return lambda names: [store.read(name) for name in names]

    return opened


def lance_table(folder: Path, entries: int, size_kb: int) -> Callable[[], Reader]:
    """Write a Lance table of names and bytes."""
    import lance
    import pyarrow as pa

    schema = pa.schema([("name", pa.string()), ("data", pa.large_binary())])

    def batches() -> Any:
        for start in range(0, entries, BATCH):
            numbers = range(start, min(start + BATCH, entries))
            names, data = map(name_of, numbers), (data_of(number, size_kb) for number in numbers)
            columns = [list(names), list(data)]
            arrays = map(pa.array, columns, schema.types)
            yield pa.record_batch(list(arrays), schema)

    path = str(folder / "cache.lance")
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), path)

    def opened() -> Reader:
        table = lance.dataset(path)
        names = table.to_table(columns=["name"]).column("name").to_pylist()
        places = {name: place for place, name in enumerate(names)}

        def read(names: Sequence[str]) -> list[Any]:
            found = table.take([places[name] for name in names], columns=["data"]).column("data")
            return [unpack(Path(name), data.as_py()) for name, data in zip(names, found, strict=True)]

        return read

    return opened


def measure(
    form: Callable[[Path, int, int], Callable[[], Reader]],
    folder: Path,
    entries: int,
    size_kb: int,
    reads: int,
) -> str:
    """Return a line of figures."""
    start = time.perf_counter()
    for number in range(entries):
        data_of(number, size_kb)
    making = time.perf_counter() - start
    start = time.perf_counter()
    opened = form(folder, entries, size_kb)
    seconds = time.perf_counter() - start - making
    written = entries * size_kb / 1000 / seconds
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in files) / 1e6
    start = time.perf_counter()
    read = opened()
    read([name_of(0)])
    opening = time.perf_counter() - start
    chosen = random.Random(0).choices([name_of(number) for number in range(entries)], k=reads)
    start = time.perf_counter()
    for name in chosen:
        read([name])
    singly = reads / (time.perf_counter() - start)
    start = time.perf_counter()
    for place in range(0, reads, BATCH):
        read(chosen[place : place + BATCH])
    in_batches = reads / (time.perf_counter() - start)
    return (
        f"{form.__name__:13s} written {written:7.0f} MB/s, {len(files):6d} files, {size:8.1f} MB, opened in "
        f"{opening:6.3f} s, {singly:7.0f} reads/s singly, {in_batches:7.0f} in batches"
    )


if __name__ == "__main__":
    main()
