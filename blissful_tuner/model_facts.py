"""What a model file is, as text and as JSON: kind, dtypes, sizes, metadata, tensors, checksums."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from modules.bars import BYTES, Bar
from modules.checkpoints.opening import Checkpoint
from modules.console import as_size, count_of
from modules.contract.loading import TensorInfo
from modules.control_codes import shorten
from modules.devices import dtype_name
from modules.errors import CheckpointError

MOST_OF_VALUE = 200  # characters of a value of the metadata; metaview.py shows all
MOST_VALUES = 40
MOST_OF_KIND = 1000  # characters of what a file is; names of unknown tensors may be long
PIECE = 1 << 20  # bytes read at once
# the first checksum that the AUTOMATIC1111 web UI looked models up by: where it begins, and its length
OLD_START, OLD_BYTES = 0x100000, 0x10000
SAFETENSORS = (".safetensors", ".sft")


@dataclass(frozen=True)
class Facts:
    """What is known of a model without reading its weights."""

    path: Path
    what: str  # a Wan transformer (--dit) for --task t2v-14B
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    left_out: tuple[str, ...]  # beside the tensors of a torch file

    @property
    def container(self) -> str:
        """Return how the tensors are stored."""
        kinds = {"safetensors" if is_safetensors(file) else "torch (pickle)" for file in self.files}
        return " and ".join(sorted(kinds))

    @property
    def file_bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def numbers(self) -> int:
        """Return how many numbers the tensors have together."""
        return sum(prod(info.shape) for info in self.tensors.values())


def facts_of(checkpoint: Checkpoint, what: str) -> Facts:
    """Return the facts of an open file. what: what it is, in words."""
    return Facts(
        checkpoint.path,
        what,
        tuple(checkpoint.parts),
        dict(checkpoint.tensors),
        dict(checkpoint.metadata),
        checkpoint.left_out,
    )


def is_safetensors(path: Path) -> bool:
    """Return whether a file, which can be opened, is a safetensors file and no torch file."""
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{" or path.suffix.lower() in SAFETENSORS


def dtypes_of(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, int, int]]:
    """Return (dtype, number of tensors, bytes), the one with most bytes first."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        counts[dtype_name(info.dtype)] += 1
        sizes[dtype_name(info.dtype)] += info.size_bytes
    return [(name, counts[name], size) for name, size in sizes.most_common()]


def as_lines(facts: Facts, listed: Mapping[str, TensorInfo] | None) -> Iterator[str]:
    """Yield the facts as lines. listed: the tensors to list; None: none is listed."""
    yield f"{facts.path}: {shorten(_in_one_line(facts.what), MOST_OF_KIND)}"
    files = f", {len(facts.files)} files" if len(facts.files) > 1 else ""
    yield f"container: {facts.container}{files}, {as_size(facts.file_bytes)}"
    numbers = "1 number" if facts.numbers == 1 else f"{facts.numbers:,} numbers"
    yield f"tensors: {len(facts.tensors)}, with {numbers}"
    for name, count, size_bytes in dtypes_of(facts.tensors):
        yield f"  {name}: {count_of(count, 'tensor')}, {as_size(size_bytes)} ({size_bytes:,} bytes)"
    if facts.left_out:
        yield f"beside the tensors, not read: {_line(', '.join(facts.left_out))}"
    if facts.metadata:
        yield "metadata:"
        for key, text in list(facts.metadata.items())[:MOST_VALUES]:
            yield f"  {_line(key)}: {_line(text)}"
        if len(facts.metadata) > MOST_VALUES:
            yield f"  and {len(facts.metadata) - MOST_VALUES} more, which metaview.py shows"
    for name, info in (listed or {}).items():
        yield f"{_in_one_line(name)}: {list(info.shape)} ({dtype_name(info.dtype)})"


def as_json(
    facts: Facts,
    listed: Mapping[str, TensorInfo] | None,
    hashes: Sequence[Mapping[str, str]],
    of_lora: Mapping[str, str],
) -> str:
    """Return the facts as JSON.

    hashes: one record for each file, if they were asked for. of_lora: checksums as in a LoRA's metadata.
    """
    content: dict[str, Any] = {
        "input": str(facts.path),
        "what": facts.what,
        "container": facts.container,
        "files": [str(file) for file in facts.files],
        "bytes": facts.file_bytes,
        "tensors": len(facts.tensors),
        "numbers": facts.numbers,
        "dtypes": {
            name: {"tensors": count, "bytes": size_bytes}
            for name, count, size_bytes in dtypes_of(facts.tensors)
        },
        "left_out": list(facts.left_out),
        "metadata": dict(facts.metadata),
    }
    if hashes:
        content["hashes"] = [dict(one) for one in hashes]
        content["lora_hashes"] = dict(of_lora)
    if listed is not None:
        content["listed"] = {
            name: {"shape": list(info.shape), "dtype": dtype_name(info.dtype)}
            for name, info in listed.items()
        }
    return json.dumps(content, indent=2)


def file_hashes(path: Path) -> dict[str, str]:
    """Return checksums of a file, which is read once: `sha256`, `data_sha256` and `old`.

    `data_sha256`, of safetensors only, is that of what follows the header, and does not change with metadata.
    Model browsers call its first 12 digits AutoV3, the first 10 of `sha256` AutoV2, and `old`, 8 digits of
    SHA-256 over 64 KiB at 1 MiB of a file that is that large, AutoV1. Raises CheckpointError if it cannot be
    read.
    """
    whole, data, old = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    try:
        has_data = is_safetensors(path)
        size = path.stat().st_size
        with path.open("rb") as file, Bar(size, f"Reading {path.name}", BYTES) as bar:
            start = 8 + int.from_bytes(file.read(8), "little") if has_data else 0
            file.seek(0)
            position = 0
            while piece := file.read(PIECE):
                whole.update(piece)
                data.update(piece[max(0, start - position) :])
                begin, end = OLD_START - position, OLD_START + OLD_BYTES - position
                old.update(piece[max(0, begin) : max(0, end)])
                position += len(piece)
                bar.update(len(piece))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    found = {"file": str(path), "sha256": whole.hexdigest()}
    if has_data:
        found["data_sha256"] = data.hexdigest()
    return found | ({"old": old.hexdigest()[:8]} if position > OLD_START else {})


def _line(text: str) -> str:
    return shorten(_in_one_line(text), MOST_OF_VALUE)


def _in_one_line(text: str) -> str:
    return text.replace("\n", "\\n")
