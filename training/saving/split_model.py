"""Train a transformer that is split over processes (`*_train.py --shard_base`): its files and its states.

The optimizer steps plain rows of each weight, so it must step every element independently; otherwise whole
weights are gathered one after the other (`optimizers/stepping.py`). A model file is gathered tensor by tensor
and written by the first process.

A state is a folder as in other runs (`states.py`), but split tensors are separate safetensors files: with
`torch.distributed.checkpoint`, each process writes its rows. Its default format is not used because it is
read with pickle, which could run code. Any number of processes can read a state again, with or without
--shard_base. All files are checked first, because rows from a missing file would silently stay unchanged.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from checkpoints.shards import SavedForm
from checkpoints.unused import OpenedTensors
from modules.atomic_write import check_space
from modules.errors import CheckpointError
from protocols.loading import TensorInfo
from runtime.offload.sharding import (
    as_sharded,
    gather_rows,
    is_sharded_weight,
    local_rows,
    slice_local_rows,
    trained_rows,
)
from training.saving.states import REMEDY, SavedState, file_checksum, select_files_to_check, write_state
from training.trainable import (
    Trainable,
    WrittenFile,
    open_unused,
    prepare_dit,
    saved_dtypes,
    unused_infos,
    written_dtypes,
)

FILE_BYTES = 128 << 20  # approximate size of a file; small, because writing it makes two copies of it
OPTIMIZER = "optimizer"  # prefix of the optimizer's tensors, next to the names of a state's parts


def prepare_sharded_dit(
    dit: nn.Module,
    learning_rate: float,
    name_parts: Sequence[str],
    part_rates: Mapping[str, float],
    file_layout: SavedForm,
) -> Trainable:
    """Train a sharded DiT; the trained parameters are this process's rows of each weight.

    Args:
        dit: The transformer.
        learning_rate: Learning rate of the run.
        name_parts: Substrings of the names of the trained parameters; empty for all.
        part_rates: Different learning rates, by a substring of the parameter's name.
        file_layout: Whether a save is one file or several.
    """
    trainable = prepare_dit(dit, learning_rate, name_parts, part_rates, file_layout)
    # sharded weight -> parameter with the rows of this process
    local_parameters = {
        weight: trained_rows(weight) for weight in trainable.parameters if is_sharded_weight(weight)
    }
    groups = [
        {**group, "params": [local_parameters.get(weight, weight) for weight in group["params"]]}
        for group in trainable.groups
    ]
    write = partial(_write_model, dit, local_parameters, written_dtypes(dit), open_unused(dit), file_layout)
    return replace(
        trainable,
        groups=groups,
        written_files={"": WrittenFile(write)},
        sharded_weights={parameter: weight for weight, parameter in local_parameters.items()},
    )


def _write_model(
    dit: nn.Module,
    local_parameters: Mapping[nn.Parameter, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    unused: OpenedTensors | None,
    file_layout: SavedForm,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write the weights of a sharded model; all processes must call this."""
    # Process 0 writes the file, tensor by tensor; the others take part in gathering each tensor.
    weights = {**dit.state_dict(), **dict(dit.named_parameters())}
    dtypes = saved_dtypes(dtypes, dtype)

    # tensors of the loaded file that the transformer does not use; they are copied to the saved one
    unused_tensors = unused_infos(unused, dtype)

    def read(name: str) -> Tensor:
        if name in unused_tensors:
            assert unused is not None
            return unused.read(name).to(unused_tensors[name].dtype)
        weight: Any = weights[name]
        if not is_sharded_weight(weight):
            return weight.detach().to(dtypes[name])
        rows = local_parameters[weight].detach() if weight in local_parameters else local_rows(weight)
        return gather_rows(rows.to(weight.device, dtypes[name]), weight)

    infos = {name: TensorInfo(dtypes[name], tuple(weight.shape)) for name, weight in weights.items()}
    all_infos = infos | unused_tensors
    if distributed.get_rank() == 0:
        file_layout.write(path, all_infos, read, metadata)
    else:  # all processes gather each tensor, in the order in which the first one writes them
        for name in file_layout.order(all_infos):
            if name in infos:
                read(name)


def write_sharded_state(folder: Path, state: SavedState) -> None:
    """Write a state whose tensors may be sharded, completely or not at all.

    All processes must call it.

    Raises:
        OutputError: If writing fails.
    """
    sharded_tensors: dict[str, Tensor] = {}
    for prefix, tensors in _tensors(state):
        for name in [name for name, value in tensors.items() if is_sharded_weight(value)]:
            sharded_tensors[f"{prefix}/{name}"] = tensors.pop(name)  # saved in separate files
    if distributed.get_rank() == 0:
        check_space(
            folder, sum(tensor.numel() * tensor.dtype.itemsize for tensor in sharded_tensors.values())
        )
        write_state(folder, state, lambda temporary: _write_files(temporary, sharded_tensors))
    else:
        _write_files(None, sharded_tensors)


def _tensors(state: SavedState) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and tensors of each part of a state; `optimizer/NAME` has the states of weight NAME."""
    yield from _writable_parts(state).items()
    for name, values in state.optimizer["states"].items():
        yield f"{OPTIMIZER}/{name}", values


def _write_files(folder: Path | None, tensors: Mapping[str, Any]) -> dict[str, int]:
    """Write the rows of all processes into the first process's `folder`; return the files' checksums."""
    (folder,) = broadcast_object_list([folder])  # from the first process
    assert folder is not None
    file_numbers = {}  # tensor -> number of its file, from 1
    total_bytes = 0
    for name, tensor in tensors.items():
        total_bytes += tensor.to_local().nbytes
        file_numbers[name] = 1 + total_bytes // FILE_BYTES
    writer = HuggingFaceStorageWriter(str(folder), file_numbers, save_distributed=True)
    save(dict(tensors), storage_writer=writer)
    return dict(gather_object([(path.name, file_checksum(path)) for path in select_files_to_check(folder)]))


def load_sharded_tensors(
    saved: SavedState,
    parts: Mapping[str, Mapping[str, Tensor]],
    sharded_weights: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Load the sharded tensors of a saved state in place into this run's tensors.

    The saved state refers to those tensors afterwards. All processes must call this.

    Args:
        saved: The saved state.
        parts: Tensors of this run by part and name.
        sharded_weights: Trained weights that are sharded in this run, by name.
        device: Device of the run.

    Raises:
        CheckpointError: If the state belongs to different weights.
    """
    targets = _allocate_tensors_to_load(saved, parts, sharded_weights, device)
    if targets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is only one process
            load(targets, storage_reader=HuggingFaceStorageReader(str(saved.folder)))
    # tensors that the state of an unsharded run contains whole
    for part, tensors in parts.items():
        _copy_local_rows(saved, part, tensors)
    for name, weight in sharded_weights.items():
        # whole moments are cut to this process's rows; scalars such as `step` stay
        optimizer_state = saved.optimizer["states"].get(name, {})
        for key, value in optimizer_state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != local_rows(weight).shape:
                optimizer_state[key] = slice_local_rows(weight, value)


def _copy_local_rows(saved: SavedState, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy this process's rows of whole saved tensors into the run's sharded tensors."""
    # The saved state refers to the sharded tensors afterwards.
    for name, tensor in tensors.items():
        saved_tensor: Any = saved.parts.get(part, {}).get(name)
        if saved_tensor is None or not is_sharded_weight(tensor) or saved_tensor.shape != tensor.shape:
            continue
        if not is_sharded_weight(saved_tensor):
            local_rows(tensor).copy_(slice_local_rows(tensor, saved_tensor))
            _writable_parts(saved)[part][name] = tensor


def _allocate_tensors_to_load(
    saved: SavedState,
    parts: Mapping[str, Mapping[str, Tensor]],
    sharded_weights: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the tensors into which the sharded tensors of a state are loaded, and put them into the state.

    1. Weights are loaded into the run's own tensors.
    2. Weights that the run lacks, or has in a different shape, become meta tensors, which are not loaded.
    3. Moments of the optimizer get new tensors, with this process's rows if the run shards their weight.
    """
    if not saved.files:
        return {}
    metadata: Any = HuggingFaceStorageReader(str(saved.folder)).read_metadata().state_dict_metadata
    for name, record in metadata.items():
        if sum(chunk.sizes.numel() for chunk in record.chunks) != record.size.numel():
            raise CheckpointError(f"rows of {name} are missing.\n  {REMEDY}")  # `load` would leave them as is
    targets: dict[str, Tensor] = {}
    for key, record in metadata.items():
        part, _, name = key.partition("/")
        if part == OPTIMIZER:
            weight_name, _, moment_name = name.rpartition("/")
            _require_weight(parts, weight_name, record.size)
            weight = sharded_weights.get(weight_name)  # None: each process has all rows of this weight
            # this process's rows, or all rows if no weight is split
            shape = record.size if weight is None else local_rows(weight).shape
            moment = torch.empty(shape, dtype=record.properties.dtype, device=device)
            targets[key] = moment if weight is None else as_sharded(weight, moment)
            saved.optimizer["states"][weight_name][moment_name] = moment
        elif part in parts:
            tensor = parts[part].get(name)
            if tensor is not None and tensor.shape == record.size:
                targets[key] = tensor
            else:  # `load_module` reports all mismatches together
                tensor = torch.empty(record.size, device="meta")
            _writable_parts(saved)[part][name] = tensor
    return targets


def _require_weight(parts: Mapping[str, Mapping[str, Tensor]], name: str, shape: torch.Size) -> None:
    """Raise CheckpointError unless the run has a weight named `name` ("part.name") with this shape."""
    part, _, weight_name = name.partition(".")
    weight = parts.get(part, {}).get(weight_name)
    if weight is None or weight.shape != shape:
        raise CheckpointError(f"its optimizer has {name} of {[*shape]}, but this run does not.\n  {REMEDY}")


def _writable_parts(saved: SavedState) -> dict[str, dict[str, Tensor]]:
    """Return `saved.parts` as writable dictionaries; `SavedState` declares them read-only."""
    return cast(dict[str, dict[str, Tensor]], saved.parts)
