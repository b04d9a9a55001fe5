"""Open and write models of several safetensors files with an index, as transformers and diffusers name them.

model-00001-of-00003.safetensors, ..., model.safetensors.index.json
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from modules.atomic_write import atomic_files, write_text
from modules.checkpoints.containers import TensorFile
from modules.checkpoints.opening import SUFFIXES, Checkpoint, checkpoint_paths, open_files, require_all_shards
from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text

MOST_SHARDS = 99_999  # their names have five digits


def split(tensors: Mapping[str, TensorInfo], most_bytes: int) -> list[dict[str, TensorInfo]]:
    """Cut tensors, in their order, into groups of at most `most_bytes`; a larger tensor is a group alone."""
    groups: list[dict[str, TensorInfo]] = []
    room = 0
    for name, info in tensors.items():
        if not groups or info.size_bytes > room:
            groups.append({})
            room = most_bytes
        groups[-1][name] = info
        room -= info.size_bytes
    return groups


def shard_paths(path: Path, count: int) -> list[Path]:
    """Return the names of the files that `path`, a .safetensors file, is cut into."""
    return [
        path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")
        for number in range(1, count + 1)
    ]


def index_path(path: Path) -> Path:
    """Return the name of the index of a model cut into files."""
    return path.with_name(path.name + INDEX)


def existing_shards(path: Path) -> list[Path]:
    """Return the index of an earlier model of this name, and the files, any number, that it was cut into.

    Remove them in this order: an index must not lead to files that are gone.
    """
    digits = "[0-9]" * 5
    found = [
        file
        for file in path.parent.glob(f"*-{digits}-of-{digits}{path.suffix}")
        if file.name[: -len(f"-00000-of-00000{path.suffix}")] == path.stem
    ]
    return ([index_path(path)] if index_path(path).exists() else []) + sorted(found)


def write_shards(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    most_bytes: int,
) -> list[Path]:
    """Write files of at most `most_bytes` and their index, all of them or none; return their paths.

    path: the name of a single file. read: as for `stream_tensors`. Files of an earlier model of this name are
    replaced; `existing_shards` lists the remaining ones. A kill may leave some of the files, which are
    refused for those that lack, but never files of two models. Raises OutputError if a file cannot be
    written, OptionError if there would be too many.
    """
    groups = split(tensors, most_bytes)
    if len(groups) > MOST_SHARDS:
        raise OptionError(
            f"--shard_size: the model would be cut into {len(groups):,} files. Give a larger size"
        )
    paths = shard_paths(path, len(groups))
    size_bytes = sum(info.size_bytes for info in tensors.values())
    weight_map = {name: target.name for group, target in zip(groups, paths, strict=True) for name in group}
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    with atomic_files(path, size_bytes) as folder:
        for group, target in zip(groups, paths, strict=True):
            stream_tensors(folder / target.name, group, read, metadata)
        write_text(folder / index_path(path).name, json.dumps(index, indent=2, sort_keys=True) + "\n")
        # an old index must not lead to new files, nor old files lie among new ones; the new index is last
        for old in (index_path(path), *paths):
            old.unlink(missing_ok=True)
    return [*paths, index_path(path)]


logger = logging.getLogger(__name__)

INDEX = ".index.json"
LISTED = 3  # names in a message


def gather(path: Path) -> Checkpoint:
    """Open a model file, any shard of one, an index of shards, or a folder.

    Of a folder an index counts; without one, all its model files are one model. A tensor may be in two files
    if it is the same in both. Raises CheckpointError as `open_checkpoint`, and if files contradict each other
    or lack tensors of the index.
    """
    parts, index = _parts_of(path)
    repeated: list[str] = []

    def are_equal(first: TensorFile, second: TensorFile, name: str) -> bool:
        is_same = first.tensors[name] == second.tensors[name] and _digest(first, name) == _digest(
            second, name
        )
        if is_same:
            repeated.append(name)
        return is_same

    checkpoint = open_files(path, parts, are_equal)
    try:
        _check_index(index, checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    for key in checkpoint.metadata:
        values = {metadata[key] for metadata in checkpoint.parts.values() if key in metadata}
        if len(values) > 1:
            logger.warning("%s: its files say different things of %s; the last one's counts", path, key)
    if repeated:
        logger.info(
            "%s: %d tensors are in two files, equal in both: %s ...", path, len(repeated), repeated[0]
        )
    return checkpoint


def _parts_of(path: Path) -> tuple[list[Path], Path | None]:
    """Return the files of a model and its index, if there is one."""
    if not path.is_dir():
        return checkpoint_paths(path), path if path.name.endswith(INDEX) else None
    indexes = sorted(path.glob(f"*{INDEX}"))
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not indexes and found:
        require_all_shards(found)
        return found, None
    parts = checkpoint_paths(path)  # raises for none, and for several indexes
    for file in sorted(set(found) - set(parts)):
        logger.info("%s is not in %s and is left out", file.name, indexes[0].name)
    return parts, indexes[0]


def _check_index(index: Path | None, checkpoint: Checkpoint) -> None:
    if index is None:
        return
    named = parse_json(read_text(index))["weight_map"]
    missing = [name for name in named if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} tensors are in none of its files: {', '.join(missing[:LISTED])}. Copy "
            "the files again.",
            index,
        )


def _digest(file: TensorFile, name: str) -> bytes:
    tensor = file.read(name)
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    return hashlib.sha256(memoryview(cast(Any, flat.numpy()))).digest()
