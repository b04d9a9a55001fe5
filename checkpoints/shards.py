"""Split a model into several safetensors files with an index, named as in diffusers and transformers.

model-00001-of-00003.safetensors, ..., model.safetensors.index.json
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from checkpoints.shard_options import INDEX, MAX_SHARDS, MODEL
from checkpoints.writing import sort_tensor_names, stream_tensors
from modules.atomic_write import atomic_folder, check_space, write_text
from modules.errors import OptionError
from protocols.loading import TensorInfo

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True)
class ShardPlan:
    """File names of a model's shards, and the tensors in each shard."""

    files: Mapping[str, Mapping[str, TensorInfo]]  # file name -> tensors of the file by name
    index_name: str
    total_bytes: int  # of all tensors

    def index(self) -> str:
        """Return the index as JSON text, which maps each tensor name to its file name."""
        weight_map = {tensor: name for name, tensors in self.files.items() for tensor in tensors}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Split tensors in order into groups of at most `max_bytes`.

    A tensor larger than `max_bytes` gets its own group.
    """
    groups: list[dict[str, TensorInfo]] = []
    bytes_left = 0  # in the last group
    for name, info in tensors.items():
        if not groups or info.size_bytes > bytes_left:
            groups.append({})
            bytes_left = max_bytes
        groups[-1][name] = info
        bytes_left -= info.size_bytes
    return groups


def plan_shards(path: Path, tensors: Mapping[str, TensorInfo], max_bytes: int, option: str) -> ShardPlan:
    """Plan a model's shards of at most `max_bytes` each.

    `path` is the name that a single file would have.

    Raises:
        OptionError: If there would be too many files; the message names `option`.
    """
    groups = split(tensors, max_bytes)
    if len(groups) > MAX_SHARDS:
        raise OptionError(f"{option}: the model would be cut into {len(groups):,} files. Use a larger size")
    files = {
        f"{path.stem}-{number:05d}-of-{len(groups):05d}{path.suffix}": group
        for number, group in enumerate(groups, start=1)
    }
    return ShardPlan(files, path.name + INDEX, sum(info.size_bytes for info in tensors.values()))


def write_planned(folder: Path, plan: ShardPlan, read: ReadTensor, metadata: Mapping[str, str]) -> None:
    """Write the shards and then their index into a temporary folder.

    Args:
        folder: The temporary folder.
        plan: Which shard contains which tensors.
        read: Returns a tensor by name.
        metadata: Metadata of every shard.
    """
    for name, tensors in plan.files.items():
        stream_tensors(folder / name, tensors, read, metadata)
    write_text(folder / plan.index_name, plan.index())


@dataclass(frozen=True)
class SavedForm:
    """How a trained model is saved: as a single file, or as a folder of shards with an index."""

    max_bytes: int = 0  # largest shard; 0: one file
    option: str = "--max_shard_size"

    def order(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """Return tensor names in the order in which their data is written, shard by shard."""
        groups = split(tensors, self.max_bytes) if self.max_bytes else [tensors]
        return [name for group in groups for name in sort_tensor_names(group)]

    def write(
        self, path: Path, tensors: Mapping[str, TensorInfo], read: ReadTensor, metadata: Mapping[str, str]
    ) -> None:
        """Write a model, completely or not at all; an existing model at `path` is replaced.

        `path` is the file, or the folder of shards. `read` returns a tensor by name.

        Raises:
            OutputError: If the model cannot be written.
            OptionError: If there would be too many files.
        """
        if not self.max_bytes:
            stream_tensors(path, tensors, read, metadata)
            return
        size_bytes = sum(info.size_bytes for info in tensors.values())
        check_space(path, size_bytes)
        with atomic_folder(path) as folder:
            self.write_in(folder / MODEL, tensors, read, metadata)

    def write_in(
        self, file: Path, tensors: Mapping[str, TensorInfo], read: ReadTensor, metadata: Mapping[str, str]
    ) -> None:
        """Write a network into a temporary folder, as one file or as shards.

        Args:
            file: Path of the single file, from which names of shards are derived.
            tensors: Dtype and shape of each tensor.
            read: Returns a tensor by name.
            metadata: Metadata of each file.
        """
        size_bytes = sum(info.size_bytes for info in tensors.values())
        if not self.max_bytes or size_bytes <= self.max_bytes:
            stream_tensors(file, tensors, read, metadata)
        else:
            plan = plan_shards(file, tensors, self.max_bytes, self.option)
            write_planned(file.parent, plan, read, metadata)


IN_ONE_FILE = SavedForm()
