"""The files that the rows of benchmarks/gpu.py load: empty ones of full size, and one with real bytes."""

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_rows import GENERATION, LOADING, TRAINING, Row
from tests.manifests import tensor_list, write_hollow

TRANSFORMERS = (TRAINING, GENERATION, LOADING)
SHARED = Path("/dev/shm")
PIECE = 1 << 24  # numbers of 16 bits, written again and again


@contextmanager
def folder_for(row: Row, asked: Path | None) -> Iterator[Path]:
    """Yield the requested folder, which is kept, or a temporary one for the files of a row."""
    if asked is not None:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(dir=None if row.kind == LOADING else memory_folder()) as made:
        yield Path(made)


def memory_folder() -> Path | None:
    """Return a folder whose files are in memory (Linux), for files without content; None without one.

    There, holes are read at once and take no space. A disk's file system fills the system's cache with zeros
    first: 6 GB took 48 s instead of 2 in a virtual machine whose memory grows as it is used.
    """
    return SHARED if SHARED.is_dir() and os.access(SHARED, os.W_OK) else None


def lay_out(row: Row, folder: Path) -> tuple[Path, Path | None]:
    """Write the missing files of a row: its model, and that of the expert for high noise.

    All except those of the loading rows are holes: they take no space and are read as zeros. Transformers are
    in bf16, although some releases have tensors in float32.
    """
    model = row.model
    names = (
        [model.manifest, f"{model.high}-high"] if model.high and row.kind == GENERATION else [model.manifest]
    )
    paths = []
    for name in names:
        real = row.kind == LOADING
        path = folder / f"{name}{'-real' if real else ''}.safetensors"
        if not path.exists():
            tensors = tensor_list(name.removesuffix("-high"))
            if row.kind in TRANSFORMERS:
                tensors = {key: ("BF16", shape) for key, (_, shape) in tensors.items()}
            write_hollow(path, tensors)
            if real:
                fill(path)
        paths.append(path)
    return paths[0], paths[1] if len(paths) > 1 else None


def vae_of(row: Row, folder: Path) -> tuple[str, ...]:
    """Return the option of a family that reads the size of latents from its VAE, with an empty file."""
    if not row.model.vae:
        return ()
    return "--vae", str(write_hollow(folder / "vae.safetensors", tensor_list(row.model.vae)))


def fill(path: Path) -> None:
    """Write random bf16 numbers after the header of an empty file, and wait until they are on disk.

    The same numbers repeat every 32 MiB: drawing them is slower than the disk.
    """
    numbers = torch.randn(PIECE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    piece = memoryview(numbers.view(torch.uint8).numpy())
    with path.open("r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        left = path.stat().st_size - file.seek(8 + header)
        while left > 0:
            left -= file.write(piece[: min(left, len(piece))])
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> bool:
    """Ask the system to drop a file from its cache; return whether it supports that (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
