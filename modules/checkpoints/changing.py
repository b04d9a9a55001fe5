"""Plan another file with the tensors of a model: other dtypes, other names, fewer tensors.

Nothing is read before it is asked for, so that a file of any size is written tensor by tensor
(`modules.checkpoints.writing`, `modules.checkpoints.sharding`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.checkpoints.finite import is_finite
from modules.checkpoints.opening import Checkpoint, plain_sources, scales_in
from modules.console import count_of
from modules.contract.loading import TensorInfo
from modules.devices import dtype_name
from modules.errors import CheckpointError, OptionError
from modules.fp8.weights import dequantise, is_fp8

QUANTISATION = "_quantization_metadata"  # ComfyUI's record of layers in 8 bits
NO_NAME = "__metadata__"  # taken in the header of a safetensors file
_MARKER = "scaled_fp8"  # a tensor that says that weights have scales
# what belongs to the weight of a layer in 8 bits, beside its scale
_COMPANIONS = (".scale_input", ".input_scale", ".comfy_quant")


@dataclass(frozen=True)
class Selection:
    """Which tensors are meant, by parts of their names."""

    targets: tuple[str, ...] = ()  # empty: all
    excluded: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Return whether the name has a part of `targets` and no part of `excluded`."""
        is_target = not self.targets or any(part in name for part in self.targets)
        return is_target and not any(part in name for part in self.excluded)


ALL = Selection()


@dataclass(frozen=True)
class CheckpointChange:
    """Changes of the new file. Selections are made by the names in the old file."""

    dtype: torch.dtype | None = None
    cast: Selection = ALL  # what is cast to it
    kept: Selection = ALL  # what is written at all
    strip: tuple[str, ...] = ()  # beginnings of names to cut off, one after the other
    add: str = ""  # what all names begin with then


@dataclass(frozen=True)
class NewFile:
    """A file to be written, its names in the order of the old one. `read` makes a tensor."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]
    notes: tuple[str, ...]  # what the user should know of it

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())


def plan_change(checkpoint: Checkpoint, change: CheckpointChange, stale: Sequence[str] = ()) -> NewFile:
    """Plan the new file; no tensor is read yet.

    stale: how metadata begin that are true of the old tensors only. Raises OptionError if a selection or a
    prefix fits no name, or two tensors would have one name; CheckpointError if the file's quantisation is
    unknown and a dtype is to be changed.
    """
    names = [name for name in checkpoint.tensors if change.kept.takes(name)]
    _check_selections(checkpoint, change, names)
    plain = plain_sources(checkpoint) if change.dtype is not None else {}
    scales = scales_in(checkpoint.tensors)
    unscaled = {  # weights that are multiplied by their scales; whole numbers stay, with theirs
        name
        for name in names
        if name in scales
        and name in plain
        and change.cast.takes(name)
        and is_fp8(checkpoint.tensors[name].dtype)
    }
    names = _without_companions(checkpoint, names, unscaled)
    _check_pairs(checkpoint, names, scales, unscaled)

    made: dict[str, TensorInfo] = {}
    old_names: dict[str, str] = {}
    for name in names:
        info = checkpoint.tensors[name]
        new = rename(name, change)
        if new in made:
            raise OptionError(f"{old_names[new]} and {name} would both be called {new}: leave one out")
        is_cast = name in plain and info.dtype.is_floating_point and change.cast.takes(name)
        made[new] = info if change.dtype is None or not is_cast else replace(info, dtype=change.dtype)
        old_names[new] = name

    def read(new: str) -> Tensor:
        name = old_names[new]
        scale = checkpoint.read(scales[name]) if name in unscaled else None
        return _as_dtype(checkpoint, name, checkpoint.read(name), scale, made[new].dtype)

    metadata, notes = _metadata(checkpoint, change, unscaled, stale)
    if unscaled:
        notes.append(
            f"in 8 bits: {count_of(len(unscaled), 'weight')}, multiplied by their scales, which are left out"
        )
    if checkpoint.left_out:
        notes.append(f"only tensors are written, not {', '.join(checkpoint.left_out[:6])}")
    dropped = len([name for name in checkpoint.tensors if not change.kept.takes(name)])
    if dropped:
        notes.append(f"{dropped} of {len(checkpoint.tensors)} tensors are left out, as asked for")
    return NewFile(made, metadata, read, tuple(notes))


def rename(name: str, change: CheckpointChange) -> str:
    """Return the name in the new file."""
    for prefix in change.strip:
        name = name.removeprefix(prefix)
    return change.add + name


def _check_selections(checkpoint: Checkpoint, change: CheckpointChange, names: Sequence[str]) -> None:
    if not names:
        raise OptionError("--full_target_keys and --full_exclude_keys leave no tensor: give other names")
    if change.dtype is not None and not any(change.cast.takes(name) for name in names):
        raise OptionError("--target_keys and --exclude_keys leave no tensor to cast: give other names")
    for index, prefix in enumerate(change.strip):
        before = replace(change, strip=change.strip[:index], add="")
        if not any(rename(name, before).startswith(prefix) for name in names):
            raise OptionError(f"--strip_prefix {prefix}: no tensor's name begins so, such as {names[0]}")
    if change.strip and any(not rename(name, replace(change, add="")) for name in names):
        raise OptionError(f"--strip_prefix {' '.join(change.strip)} leaves nothing of a tensor's name")
    if NO_NAME in {rename(name, change) for name in names}:
        raise OptionError(
            f"a tensor would be called {NO_NAME}, which stands for the metadata: leave it out with "
            f"--full_exclude_keys {NO_NAME}, or give an --add_prefix"
        )


def _without_companions(checkpoint: Checkpoint, names: Sequence[str], unscaled: set[str]) -> list[str]:
    """Return the names without those that these weights no longer need after their scales are applied."""
    scales = scales_in(checkpoint.tensors)
    gone = {scales[weight] for weight in unscaled}
    gone |= {weight.removesuffix(".weight") + ending for weight in unscaled for ending in _COMPANIONS}
    if unscaled and not set(scales) & set(names) - unscaled:
        gone |= {name for name in names if name.endswith(_MARKER)}
    return [name for name in names if name not in gone]


def _check_pairs(
    checkpoint: Checkpoint, names: Sequence[str], scales: Mapping[str, str], unscaled: set[str]
) -> None:
    """Raise OptionError if a weight would be written without its scale, or a scale without its weight."""
    kept = set(names)
    for weight, scale in scales.items():
        if weight in checkpoint.tensors and weight not in unscaled and (weight in kept) != (scale in kept):
            raise OptionError(
                f"{weight} is in 8 bits and means nothing without {scale}: keep both, or leave both out"
            )


def _as_dtype(
    checkpoint: Checkpoint, name: str, tensor: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if scale is None and tensor.dtype == dtype:
        return tensor
    try:
        made = dequantise(tensor, scale, dtype)
    except RuntimeError as error:
        shape = None if scale is None else list(scale.shape)
        raise CheckpointError(
            f"{checkpoint.path}: the scale of {name} has the shape {shape}, which does not fit "
            f"{list(tensor.shape)}. Download or copy the file again.",
            checkpoint.path,
        ) from error
    if not is_finite(made) and is_finite(tensor):
        raise CheckpointError(
            f"{checkpoint.path}: {name} has values that {dtype_name(dtype)} cannot hold. Use --dtype "
            f"{'fp32' if dtype == torch.bfloat16 else 'bf16'}, or --exclude_keys {name}.",
            checkpoint.path,
        )
    return made


def _metadata(
    checkpoint: Checkpoint, change: CheckpointChange, unscaled: set[str], stale: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of the new file, and notes on missing entries."""
    old = checkpoint.metadata
    kept = {key: text for key, text in old.items() if not key.startswith(tuple(stale))}
    notes = [f"{key} is left out: it is that of the old tensors" for key in old if key not in kept]
    if QUANTISATION in kept:
        kept[QUANTISATION] = _record_of_layers(checkpoint, change, unscaled)
        if not kept[QUANTISATION]:
            del kept[QUANTISATION]
    return {"format": "pt", **kept}, notes  # transformers loads no file without a format


def _record_of_layers(checkpoint: Checkpoint, change: CheckpointChange, unscaled: set[str]) -> str:
    """Return ComfyUI's record of layers in 8 bits for the new file; empty if there are none."""
    try:
        record = json.loads(checkpoint.metadata[QUANTISATION])
        layers = record["layers"].items()
        new = {}
        for layer, how in layers:
            # the names of layers have no prefix of a whole model: find the tensor that is meant
            pattern = re.compile(rf"(.*\.)?{re.escape(layer)}\.weight")
            weights = [name for name in checkpoint.tensors if pattern.fullmatch(name)]
            if len(weights) == 1 and change.kept.takes(weights[0]) and weights[0] not in unscaled:
                had = weights[0].removesuffix(f"{layer}.weight")
                new[rename(weights[0], change).removesuffix(".weight").removeprefix(had)] = how
        return json.dumps({**record, "layers": new}) if new else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its record of quantisation cannot be read ({error!r}).", checkpoint.path
        ) from error
