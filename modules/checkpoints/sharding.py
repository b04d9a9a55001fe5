"""Write a model as several safetensors files with an index, as transformers and diffusers name them.

model-00001-of-00003.safetensors, ..., model.safetensors.index.json
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from modules.atomic_write import atomic_files, write_text
from modules.checkpoints.gathering import INDEX
from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import OptionError

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

    path: what one file would be called. read: as for `stream_tensors`. Files of an earlier model of this name
    are replaced; `existing_shards` tells which remain. A kill may leave some of the files, which are refused
    for those that lack, but never files of two models. Raises OutputError if a file cannot be written,
    OptionError if there would be too many.
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
