"""Open all files of a model to look at them or to write them anew: shards, an index, or a whole folder."""

import hashlib
import logging
from pathlib import Path
from typing import Any, cast

import torch

from modules.checkpoints.containers import TensorFile
from modules.checkpoints.opening import SUFFIXES, Checkpoint, checkpoint_paths, open_files, require_all_shards
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

INDEX = ".index.json"
LISTED = 3  # names in a message


def gather(path: Path) -> Checkpoint:
    """Open a model file, any shard of one, an index of shards, or a folder.

    Of a folder an index counts; without one, all its model files are one model. A tensor may be in two files
    if it is the same in both. Raises CheckpointError as `open_checkpoint`, and if files contradict each other
    or do not have what the index says.
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
