"""Plan a changed copy of a model file: other dtypes, other names, fewer tensors, several files.

Tensors are read only when they are written, so that a file of any size can be written tensor by tensor
(`checkpoints.writing`, for several files `checkpoints.shards`).
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from checkpoints.containers import COMFY_QUANT_KEY, COMFY_QUANT_SUFFIX, TensorFile
from checkpoints.finite import is_finite
from checkpoints.opening import (
    SUFFIXES,
    Checkpoint,
    checkpoint_paths,
    find_scales,
    list_tensor_sources,
    open_checkpoint,
    require_all_shards,
)
from checkpoints.shard_options import INDEX
from checkpoints.shards import plan_shards, write_planned
from checkpoints.stored.fp8 import dequantize, is_fp8
from modules.atomic_write import atomic_files
from modules.console import format_count
from modules.devices import dtype_name
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

MAX_LISTED_NAMES = 3  # number of names in a message
METADATA_ENTRY = "__metadata__"  # not possible as a tensor name: reserved in the header of a safetensors file
_SCALED_FP8_MARKER = "scaled_fp8"  # name of a tensor that marks files with scaled weights
# suffixes of the other tensors of an 8-bit layer
_COMPANIONS = (".scale_input", ".input_scale", COMFY_QUANT_SUFFIX)


@dataclass(frozen=True)
class Selection:
    """Selects tensors whose names contain given substrings."""

    targets: tuple[str, ...] = ()  # (): all names
    excluded: tuple[str, ...] = ()

    def selects(self, name: str) -> bool:
        """Return whether a tensor's name contains one of `targets`, if any, and none of `excluded`."""
        is_target = not self.targets or any(part in name for part in self.targets)
        return is_target and not any(part in name for part in self.excluded)


ALL = Selection()


@dataclass(frozen=True)
class CheckpointChange:
    """What to change in a checkpoint; tensors are selected by their names in the source file."""

    dtype: torch.dtype | None = None  # None: dtypes are kept
    cast: Selection = ALL  # tensors that are cast to `dtype`
    selected: Selection = ALL  # tensors in the new file
    strip_prefixes: tuple[str, ...] = ()  # prefixes to remove from names, one after another
    add_prefix: str = ""  # prefix to add to all names afterwards


@dataclass(frozen=True)
class NewFile:
    """Tensors and metadata of a file to write, and notes for the user."""

    tensors: Mapping[str, TensorInfo]  # in the order of the old file
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]  # takes the new name of a tensor
    notes: tuple[str, ...]  # sentences for the user about what was changed or left out

    @property
    def size_bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(info.size_bytes for info in self.tensors.values())


def reject_packed(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a weight is stored in a packed shape, because it cannot be copied."""
    for name, info in checkpoint.tensors.items():
        if info.packing is not None and info.packing.shape != info.shape:
            raise CheckpointError(
                f"{checkpoint.path} stores {name} in 4 or 8 bits, packed. Convert it to a 16-bit file first: "
                "tools/quantise.py FILE RESULT --form bf16",
                checkpoint.path,
            )


def plan_change(
    checkpoint: Checkpoint, change: CheckpointChange, stale_metadata: Sequence[str] = ()
) -> NewFile:
    """Plan the tensors, metadata and notes of a changed checkpoint, without reading tensors.

    1. Select the tensors, and drop the scales of fp8 weights that are cast.
    2. Map new names to old names, and plan the dtype of each tensor.
    3. Update the metadata, and list notes for the user.

    Args:
        checkpoint: The opened source file.
        change: What to change.
        stale_metadata: Prefixes of metadata keys that describe only the old tensors and are dropped.

    Raises:
        OptionError: If a selection or a prefix matches no name, or if two tensors would get the same name.
        CheckpointError: If the file has packed weights, or if dtypes change and the file's quantization is
            unknown.
    """
    reject_packed(checkpoint)
    names = [name for name in checkpoint.tensors if change.selected.selects(name)]
    _check_selections(change, names)
    # the tensors that can be cast: scales and other companions have no source
    sources = list_tensor_sources(checkpoint) if change.dtype is not None else {}
    scales = find_scales(checkpoint.tensors)
    dequantized = _find_cast_fp8_weights(checkpoint, change, names, scales.keys() & sources.keys())
    names = _without_scales(names, scales, dequantized)
    _check_scale_pairs(checkpoint, names, scales, dequantized)

    old_names = _map_new_to_old_names(names, change)
    tensors = _plan_dtypes(checkpoint, change, old_names, sources.keys())

    def read(new_name: str) -> Tensor:
        name = old_names[new_name]
        scale = checkpoint.read(scales[name]) if name in dequantized else None
        tensor = checkpoint.read(name)
        # Multiply a tensor by its scale, if any, and cast it; raise CheckpointError if values overflow
        dtype = tensors[new_name].dtype
        if scale is None and tensor.dtype == dtype:
            return tensor
        try:
            converted = dequantize(tensor, scale, dtype)
        except RuntimeError as error:  # the shapes of tensor and scale cannot be broadcast
            shape = None if scale is None else list(scale.shape)
            raise CheckpointError(
                f"{checkpoint.path}: the scale of {name} has the shape {shape}, which does not fit "
                f"{list(tensor.shape)}. Download or copy the file again.",
                checkpoint.path,
            ) from error
        if not is_finite(converted) and is_finite(tensor):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has values that {dtype_name(dtype)} cannot represent. Use "
                f"--dtype {'fp32' if dtype == torch.bfloat16 else 'bf16'}, or --exclude_keys {name}.",
                checkpoint.path,
            )
        return converted

    metadata, metadata_notes = _make_metadata(checkpoint, change, dequantized, stale_metadata)
    notes = (*metadata_notes, *_list_notes(checkpoint, change, len(dequantized)))
    return NewFile(tensors, metadata, read, notes)


def _find_cast_fp8_weights(
    checkpoint: Checkpoint, change: CheckpointChange, names: Sequence[str], scaled_weights: Collection[str]
) -> set[str]:
    """Return the fp8 weights that are cast: they are multiplied by their scales, which are then dropped."""
    # Integer weights keep their dtype and their scales.
    cast_weights: set[str] = set()
    for name in names:
        is_cast = name in scaled_weights and change.cast.selects(name)
        if is_cast and is_fp8(checkpoint.tensors[name].dtype):
            cast_weights.add(name)
    return cast_weights


def _plan_dtypes(
    checkpoint: Checkpoint,
    change: CheckpointChange,
    old_names: Mapping[str, str],
    castable_names: Collection[str],
) -> dict[str, TensorInfo]:
    """Return the dtype and shape of each tensor of the new file, by its new name."""
    tensors: dict[str, TensorInfo] = {}
    for new_name, name in old_names.items():
        info = checkpoint.tensors[name]
        is_castable = name in castable_names and info.dtype.is_floating_point
        if change.dtype is not None and is_castable and change.cast.selects(name):
            info = replace(info, dtype=change.dtype)
        tensors[new_name] = info
    return tensors


def _list_notes(checkpoint: Checkpoint, change: CheckpointChange, num_dequantized: int) -> list[str]:
    """Return notes for the user about dequantized weights and omitted tensors of the new file."""
    notes: list[str] = []
    if num_dequantized:
        weights = format_count(num_dequantized, "weight")
        notes.append(f"in 8 bits: {weights}, multiplied by their scales, which are left out")
    if checkpoint.left_out:
        notes.append(f"only tensors are written, not {', '.join(checkpoint.left_out[:6])}")
    num_dropped = sum(not change.selected.selects(name) for name in checkpoint.tensors)
    if num_dropped:
        notes.append(f"{num_dropped} of {len(checkpoint.tensors)} tensors are left out, as requested")
    return notes


def _without_scales(names: Sequence[str], scales: Mapping[str, str], dequantized: set[str]) -> list[str]:
    """Return tensor names without the scales and companion tensors of the weights in `dequantized`."""
    unneeded = {scales[weight] for weight in dequantized}
    for weight in dequantized:
        layer = weight.removesuffix(".weight")
        unneeded |= {layer + ending for ending in _COMPANIONS}
    still_scaled = set(scales) & set(names) - dequantized  # weights that keep their scales
    if dequantized and not still_scaled:  # no scaled weight is left, so the file is not marked as scaled
        unneeded |= {name for name in names if name.endswith(_SCALED_FP8_MARKER)}
    return [name for name in names if name not in unneeded]


def _check_scale_pairs(
    checkpoint: Checkpoint, names: Sequence[str], scales: Mapping[str, str], dequantized: set[str]
) -> None:
    """Raise OptionError if only one of an 8-bit weight and its scale would be written to the new file."""
    remaining = set(names)
    for weight, scale in scales.items():
        is_pair = (weight in remaining) == (scale in remaining)
        if weight in checkpoint.tensors and weight not in dequantized and not is_pair:
            raise OptionError(f"{weight} is in 8 bits and unusable without {scale}: keep both, or omit both")


def _map_new_to_old_names(names: Sequence[str], change: CheckpointChange) -> dict[str, str]:
    """Map each new tensor name to the old name."""
    old_names: dict[str, str] = {}
    for name in names:
        new_name = rename(name, change)
        if new_name in old_names:
            raise OptionError(f"{old_names[new_name]} and {name} would both be called {new_name}: omit one")
        old_names[new_name] = name
    return old_names


def rename(name: str, change: CheckpointChange) -> str:
    """Return a tensor's new name: `strip_prefixes` are removed, then `add_prefix` is added."""
    for prefix in change.strip_prefixes:
        name = name.removeprefix(prefix)
    return change.add_prefix + name


def _check_selections(change: CheckpointChange, names: Sequence[str]) -> None:
    """Raise OptionError if the options select no tensor, or rename tensors in a way that cannot be saved."""
    if not names:
        raise OptionError("--full_target_keys and --full_exclude_keys leave no tensor: pass other names")
    if change.dtype is not None and not any(change.cast.selects(name) for name in names):
        raise OptionError("--target_keys and --exclude_keys leave no tensor to cast: pass other names")
    # Raise OptionError if a prefix to strip begins no name, or if nothing of a name remains
    # each prefix is removed from the result of the previous one
    stripped_names = list(names)
    for prefix in change.strip_prefixes:
        if not any(name.startswith(prefix) for name in stripped_names):
            raise OptionError(f"--strip_prefix {prefix}: no tensor name begins with it, such as {names[0]}")
        stripped_names = [name.removeprefix(prefix) for name in stripped_names]
    if change.strip_prefixes and not all(stripped_names):
        raise OptionError(
            f"--strip_prefix {' '.join(change.strip_prefixes)} removes the complete name of a tensor"
        )
    # safetensors headers use this key for metadata
    if METADATA_ENTRY in {rename(name, change) for name in names}:
        raise OptionError(
            f"a tensor would be called {METADATA_ENTRY}, which is reserved for the metadata: omit it "
            f"with --full_exclude_keys {METADATA_ENTRY}, or pass an --add_prefix"
        )


def _make_metadata(
    checkpoint: Checkpoint, change: CheckpointChange, dequantized: set[str], stale_metadata: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of the new file, and notes on omitted metadata."""
    metadata = {"format": "pt"}  # default, because transformers rejects files without a format
    notes = []
    for key, text in checkpoint.metadata.items():
        if key.startswith(tuple(stale_metadata)):
            notes.append(f"{key} is left out: it belongs to the old tensors")
        else:
            metadata[key] = text
    if COMFY_QUANT_KEY in metadata:  # ComfyUI's record of quantized layers
        try:
            record = parse_json(metadata[COMFY_QUANT_KEY])
            layers = _rename_layers(checkpoint, change, dequantized, record["layers"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: its quantization record cannot be read ({error!r}).", checkpoint.path
            ) from error
        if layers:
            metadata[COMFY_QUANT_KEY] = json.dumps({**record, "layers": layers})
        else:
            del metadata[COMFY_QUANT_KEY]
    return metadata, notes


def _rename_layers(
    checkpoint: Checkpoint, change: CheckpointChange, dequantized: set[str], layers: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ComfyUI's record of 8-bit layers by new name, without layers that are no longer 8-bit."""
    renamed = {}
    for layer_name, settings in layers.items():
        # tensor names may have a prefix that layer names in the record lack
        pattern = re.compile(rf"(.*\.)?{re.escape(layer_name)}\.weight")
        weight_names = [name for name in checkpoint.tensors if pattern.fullmatch(name)]
        if len(weight_names) != 1:  # the layer is not in the file, or its prefix is ambiguous
            continue
        weight_name = weight_names[0]
        if change.selected.selects(weight_name) and weight_name not in dequantized:
            prefix = weight_name.removesuffix(f"{layer_name}.weight")
            new_layer_name = rename(weight_name, change).removesuffix(".weight")
            renamed[new_layer_name.removeprefix(prefix)] = settings
    return renamed


def existing_shards(path: Path) -> list[Path]:
    """Return the files of an existing sharded model: its index, if it has one, then all shards.

    Remove them in this order, so that the index never refers to missing files. `path` is the name that a
    single file of the model would have.
    """
    digits = "[0-9]" * 5
    shard_ending = f"-00000-of-00000{path.suffix}"
    shards = []
    # the stem is not put into the pattern, because it may contain characters such as [ or *
    for file in path.parent.glob(f"*-{digits}-of-{digits}{path.suffix}"):
        if file.name[: -len(shard_ending)] == path.stem:
            shards.append(file)
    index = path.with_name(path.name + INDEX)
    return ([index] if index.exists() else []) + sorted(shards)


def write_shards(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    max_bytes: int,
) -> list[Path]:
    """Write shards of at most `max_bytes` and their index, all of them or none; return their paths.

    Files of an existing model with this name are replaced; `existing_shards` lists its other files. If the
    process is killed, an incomplete set may remain, which `open_checkpoint` rejects, but never a mixture of
    two models.

    Args:
        path: The name that a single file would have.
        tensors: Dtype and shape of each tensor.
        read: Returns a tensor by name.
        metadata: Metadata of each shard.
        max_bytes: Maximum size of a shard.

    Raises:
        OutputError: If a file cannot be written.
        OptionError: If there would be too many shards.
    """
    plan = plan_shards(path, tensors, max_bytes, "--shard_size")
    paths = [path.with_name(name) for name in plan.files]
    index_path = path.with_name(plan.index_name)
    with atomic_files(path, plan.total_bytes) as folder:
        write_planned(folder, plan, read, metadata)
        # old files are removed first, so that old and new files never mix; the new index is moved last
        for old in (index_path, *paths):
            old.unlink(missing_ok=True)
    return [*paths, index_path]


def gather(path: Path) -> Checkpoint:
    """Open a model file, any shard of a model, an index of shards, or a folder.

    If a folder has no index, all model files in it form one model. A tensor may be in two files if its values
    are equal in both.

    Raises:
        CheckpointError: If a file is missing, damaged or not a model, if two files have different values for
            a tensor, or if the index lists tensors that no file contains.
    """
    parts, index = _find_parts_and_index(path)
    repeated: list[str] = []  # names of tensors that are in two files

    def note_if_equal(first: TensorFile, second: TensorFile, name: str) -> bool:
        are_equal = _are_equal(first, second, name)
        if are_equal:
            repeated.append(name)
        return are_equal

    checkpoint = open_checkpoint(path, parts, note_if_equal)
    try:
        if index is not None:
            # Raise CheckpointError if the checkpoint's files lack tensors that its index lists
            names = parse_json(read_text(index))["weight_map"]
            missing = [name for name in names if name not in checkpoint.tensors]
            if missing:
                raise CheckpointError(
                    f"{index}: {len(missing)} tensors are in none of its files: "
                    f"{', '.join(missing[:MAX_LISTED_NAMES])}. Copy the files again.",
                    index,
                )
    except BaseException:
        checkpoint.close()
        raise
    for key in checkpoint.metadata:
        values = {metadata[key] for metadata in checkpoint.metadata_by_file.values() if key in metadata}
        if len(values) > 1:
            logger.warning("%s: its files differ in %s; the last file takes precedence", path, key)
    if repeated:
        logger.info(
            "%s: %d tensors are in two files, equal in both: %s ...", path, len(repeated), repeated[0]
        )
    return checkpoint


def _find_parts_and_index(path: Path) -> tuple[list[Path], Path | None]:
    """Return the files of a model, and the path of its index; None as the path if it has no index."""
    if not path.is_dir():
        return checkpoint_paths(path), path if path.name.endswith(INDEX) else None
    indexes = sorted(path.glob(f"*{INDEX}"))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not indexes and files:
        require_all_shards(files)
        return files, None
    parts = checkpoint_paths(path)  # raises an error unless there is exactly one index
    index = indexes[0]
    for file in sorted(set(files) - set(parts)):
        logger.info("%s is not in %s and is left out", file.name, index.name)
    return parts, index


def _are_equal(first: TensorFile, second: TensorFile, name: str) -> bool:
    """Return whether a tensor has the same dtype, shape and values in both files."""
    if first.tensors[name] != second.tensors[name]:
        return False
    return _hash_tensor(first, name) == _hash_tensor(second, name)


def _hash_tensor(file: TensorFile, name: str) -> bytes:
    info = file.tensors[name]
    tensor = file.borrow(name, torch.empty(info.size_bytes, dtype=torch.uint8)).contiguous()
    all_bytes = tensor.view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(cast(Any, all_bytes))).digest()
