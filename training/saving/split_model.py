"""Train a transformer that is split over processes (`*_train.py --shard_base`): its files and its states.

The optimizer steps plain rows of each weight, so it must step every number by itself, or be shown whole
weights one after the other (`optimizers/stepping.py`). A model file is gathered tensor by tensor, and is
written by the first process.

A state is a folder as in other runs (`states.py`), without the tensors that are split: these are written by
`torch.distributed.checkpoint` as safetensors files, each process its rows; its usual format is read with
pickle, which could run code. Any number of processes can read a state again, with or without --shard_base;
all files are checked first, because rows from a missing file would silently stay as they were.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from modules.atomic_write import check_space
from modules.checkpoints.writing import order_of, stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import CheckpointError
from modules.offload.sharding import as_split, gather_rows, is_split, rows_here, rows_of, trained_rows
from training.saving.states import REMEDY, SavedState, file_checksum, share_of_files, write_state
from training.trainable import Trainable, kept_dtypes, train_dit

FILE_BYTES = 128 << 20  # about so much of a process' rows is in a file: two copies of it are made to write it
OPTIMIZER = "optimizer"  # beside the parts of a state


def train_split_dit(dit: nn.Module, learning_rate: float, name_parts: Sequence[str] = ()) -> Trainable:
    """Train a DiT whose blocks are split as `train_dit` does; its parameters are the rows of this process."""
    usual = train_dit(dit, learning_rate, name_parts)
    rows = {weight: trained_rows(weight) for weight in usual.parameters if is_split(weight)}
    groups = [
        {**group, "params": [rows.get(weight, weight) for weight in group["params"]]}
        for group in usual.groups
    ]
    dtypes = {name: tensor.dtype for name, tensor in dit.state_dict().items()}
    return replace(
        usual,
        groups=groups,
        writes={"": partial(_write_model, dit, rows, dtypes)},
        split={part: weight for weight, part in rows.items()},
    )


def _write_model(
    dit: nn.Module,
    rows: Mapping[nn.Parameter, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write the current weights, or the average if it is in their place. All processes must call it."""
    weights, kept = {**dit.state_dict(), **dict(dit.named_parameters())}, kept_dtypes(dtypes, dtype)

    def read(name: str) -> Tensor:
        weight: Any = weights[name]
        if not is_split(weight):
            return weight.detach().to(kept[name])
        part = rows[weight].detach() if weight in rows else rows_here(weight)
        return gather_rows(part.to(weight.device, kept[name]), weight)

    infos = {name: TensorInfo(kept[name], tuple(weight.shape)) for name, weight in weights.items()}
    if distributed.get_rank() == 0:
        stream_tensors(path, infos, read, metadata)
    else:
        for name in order_of(infos):
            read(name)


def write_split_state(folder: Path, state: SavedState) -> None:
    """Write a state whose tensors may be split, completely or not at all. All processes must call it.

    Raises OutputError if writing fails.
    """
    split: dict[str, Tensor] = {}
    for prefix, tensors in _tensors(state):
        for name in [name for name, value in tensors.items() if is_split(value)]:
            split[f"{prefix}/{name}"] = tensors.pop(name)
    if distributed.get_rank() == 0:
        check_space(folder, sum(tensor.numel() * tensor.dtype.itemsize for tensor in split.values()))
        write_state(folder, state, lambda temporary: _write_files(temporary, split))
    else:
        _write_files(None, split)


def _tensors(state: SavedState) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, tensors) of a state's parts, and of the optimizer's states as `optimizer/NAME`."""
    yield from _parts(state).items()
    for name, values in state.optimizer["states"].items():
        yield f"{OPTIMIZER}/{name}", values


def _write_files(folder: Path | None, tensors: Mapping[str, Any]) -> dict[str, int]:
    """Write the rows of all processes to the first one's `folder`; return the checksums of the files."""
    (folder,) = broadcast_object_list([folder])
    assert folder is not None
    ends = accumulate(tensor.to_local().nbytes for tensor in tensors.values())
    numbers = {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}
    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True))
    return dict(gather_object([(path.name, file_checksum(path)) for path in share_of_files(folder)]))


def fill_state(
    saved: SavedState,
    own: Mapping[str, Mapping[str, Tensor]],
    split: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Read the split tensors of a state into those of this run, and put these into the state.

    own: tensors of this run by part and name. split: by the names of weights that are split here.
    All processes must call it. Raises CheckpointError if the state is of other weights.
    """
    targets: dict[str, Tensor] = {}
    described: Any = {}
    if saved.files:
        described = HuggingFaceStorageReader(str(saved.folder)).read_metadata().state_dict_metadata
    for name, each in described.items():
        if sum(chunk.sizes.numel() for chunk in each.chunks) != each.size.numel():
            raise CheckpointError(f"rows of {name} are missing.\n  {REMEDY}")  # `load` would leave them as is
    for key, each in described.items():
        part, _, name = key.partition("/")
        shape = each.size
        if part == OPTIMIZER:
            name, _, item = name.rpartition("/")
            value, targets[key] = _empty_moment(
                name, shape, each.properties.dtype, own, split.get(name), device
            )
            saved.optimizer["states"][name][item] = value
        elif part in own:
            ours = own[part].get(name)
            if ours is None or ours.shape != shape:  # reported where all names and shapes are compared
                ours = torch.empty(shape, device="meta")
            else:
                targets[key] = ours
            _parts(saved)[part][name] = ours
    if targets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            load(targets, storage_reader=HuggingFaceStorageReader(str(saved.folder)))
    for part, tensors in own.items():
        for name, ours in tensors.items():
            kept: Any = saved.parts.get(part, {}).get(name)
            if kept is None or not is_split(ours) or kept.shape != ours.shape:
                continue
            if not is_split(kept):  # the state is whole
                rows_here(ours).copy_(rows_of(ours, kept))
                _parts(saved)[part][name] = ours
    for name, weight in split.items():
        values = saved.optimizer["states"].get(name, {})
        for item, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != rows_here(weight).shape:
                values[item] = rows_of(weight, value)


def _empty_moment(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    own: Mapping[str, Mapping[str, Tensor]],
    weight: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return an empty moment for this process' rows of a weight, and the (split) tensor to load it by.

    Raises CheckpointError if this run has no weight of that name and shape.
    """
    part, _, rest = name.partition(".")
    ours = own.get(part, {}).get(rest)
    if ours is None or ours.shape != shape:
        raise CheckpointError(f"its optimizer has {name} of {[*shape]}, and this run has not.\n  {REMEDY}")
    value = torch.empty(shape if weight is None else rows_here(weight).shape, dtype=dtype, device=device)
    return value, value if weight is None else as_split(weight, value)


def _parts(saved: SavedState) -> dict[str, dict[str, Tensor]]:
    return cast(dict[str, dict[str, Tensor]], saved.parts)
