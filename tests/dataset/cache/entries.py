"""Entries of shards: made, read back, and counted by number."""

from pathlib import Path

import torch

from dataset.cache.catalog import list_shards
from dataset.cache.shards import ShardStore
from dataset.cache_files import CacheStore
from modules.errors import CacheError

NAMES = [f"clip_{number}_00000-005_0032x0032_toy.safetensors" for number in range(6)]
ODD = ["ein Bär_toy_te.safetensors", "x" * 130 + "_toy_te.safetensors", "bad\udce9_toy_te.safetensors"]


def tensors(number: int) -> dict[str, torch.Tensor]:
    values = torch.arange(6000 + 7 * number, dtype=torch.float32) + number
    return {
        "latents_1x1x1_float32": values,
        "mask": torch.tensor([number]),
        "b_bfloat16": values[:2].bfloat16(),
    }


def fill(store: CacheStore, names: list[str], start: int = 0) -> None:
    for number, name in enumerate(names, start):
        write(store, name, number)


def write(store: CacheStore, name: str, number: int) -> None:
    store.write(name, tensors(number), {"architecture": "toy", "number": str(number)})


def number_of(store: CacheStore, name: str) -> int:
    return int(store.read(name).metadata["number"])


def make_shards(folder: Path) -> Path:
    """A folder of shards, in order."""
    store = ShardStore(folder)
    fill(store, NAMES)
    store.close(is_last=True)
    return folder


def shard(folder: Path) -> Path:
    (name,) = list_shards(folder)
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without what a killed process was writing: that goes when it is old."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".tmp"]
    return {path.name: path.read_bytes() for path in paths}


def seen(folder: Path) -> dict[str, int]:
    """The entries that can be read."""
    store, found = ShardStore(folder), {}
    for name in store.names():
        try:
            found[name] = number_of(store, name)
        except CacheError:
            continue
    return found


FULL = {name: number for number, name in enumerate(NAMES)}


def end_one(folder: Path) -> None:
    """Write an entry in another process, and end its run."""
    store = ShardStore(folder)
    write(store, "small", 1)
    store.close(is_last=True)
