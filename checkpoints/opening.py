"""Find and open model files in any format, list their tensors, and describe how to read unquantized tensors.

with open_checkpoint(path) as checkpoint:
    sources = list_tensor_sources(checkpoint)        # or sources renamed by a model family
    ...                                              # `filling.load_module` fills a network with them
"""

import contextlib
import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from checkpoints.containers import (
    BNB_STATE_INFIX,
    COMFY_QUANT_KEY,
    COMFY_QUANT_SUFFIX,
    PICKLE,
    ZIP,
    SafetensorsFile,
    TensorFile,
    TorchFile,
)
from checkpoints.first_bytes import GGUF, describe_kind, is_pointer_or_page
from checkpoints.stored.forms import QuantizedWeight
from modules.control_codes import shorten
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.limits import MAX_SHARDS
from modules.paths import explain_missing
from modules.text_files import parse_json, read_text, require_regular_file
from protocols.loading import TensorInfo, TensorSource

MAX_LISTED_NAMES = 8  # number of file names in a message
MAX_NAME_LENGTH = 200  # characters of a file name that a message shows
SUFFIXES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


# an open file, and the name that a tensor has in it
Location: TypeAlias = tuple[TensorFile, str]


class Checkpoint(contextlib.ExitStack):
    """The tensors of one or more files, read on demand by name; also a context manager that closes them."""

    def __init__(
        self,
        path: Path,
        locations: Mapping[str, Location],
        files: Sequence[TensorFile],
        rejection: str = "",
    ) -> None:
        """Take over open files, which are closed together with the checkpoint.

        Args:
            path: The file or folder, for messages.
            locations: File of each tensor and the name there, by name.
            files: All open files.
            rejection: Why packed weights of the file cannot be read; "" if they can be read.
        """
        super().__init__()
        for file in files:
            self.callback(file.close)
        self.path = path
        self.rejection = rejection
        self._files = files
        self._locations = dict(locations)
        self.tensors: dict[str, TensorInfo] = {}
        for name, (file, stored_name) in locations.items():
            self.tensors[name] = file.tensors[stored_name]
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata |= file.metadata
        # names in the files that are not tensors
        self.left_out = tuple(name for file in files for name in file.left_out)
        self.metadata_by_file = {file.path: file.metadata for file in files}

    def read(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """Read a tensor to the CPU, into new memory or into `tensor`, which must be contiguous.

        Raises:
            CheckpointError: If the file is truncated.
        """
        info = self.tensors[name]
        if tensor is None:
            tensor = torch.empty((info.packing or info).shape, dtype=info.dtype)
        # safetensors files read into the given memory; a memory-mapped file returns a view of its own
        borrowed = self.borrow(name, tensor.view(-1).view(torch.uint8))
        if borrowed.data_ptr() != tensor.data_ptr():
            tensor.copy_(borrowed)
        return tensor

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a CPU tensor of the file that stays valid only until the next read.

        Args:
            name: Name of the tensor.
            read_buffer: Byte buffer (uint8) that the tensor may be a view of.

        Raises:
            CheckpointError: If the file is truncated.
        """
        file, stored_name = self._locations[name]
        try:
            return file.borrow(stored_name, read_buffer)
        except OSError as error:
            message = f"{self.path} cannot be read: {error.strerror or error}."
            raise CheckpointError(message, self.path) from error

    def stored_name(self, name: str) -> str:
        """Return a tensor's full name in its file, including prefixes that `without_prefix` removed."""
        return self._locations[name][1]

    def without_prefix(self, *prefixes: str, ignored_prefixes: Sequence[str] = ()) -> "Checkpoint":
        """Return a checkpoint with prefixes removed, each only if all tensors of the network have it.

        This check ignores tensors of other networks in an all-in-one file (`ignored_prefixes`); they are left
        out if a prefix is removed. Both checkpoints share the open files: close only one of them.
        """
        locations: Mapping[str, Location] = self._locations
        for prefix in prefixes:
            with_prefix = {name: where for name, where in locations.items() if name.startswith(prefix)}
            remaining = locations.keys() - with_prefix.keys()
            if with_prefix and all(name.startswith(tuple(ignored_prefixes)) for name in remaining):
                locations = {name.removeprefix(prefix): where for name, where in with_prefix.items()}
        return Checkpoint(self.path, locations, self._files, self.rejection)

    def select_by_prefix(self, *prefixes: str) -> "Checkpoint":
        """Return a checkpoint with only the tensors that have one of the prefixes; it shares open files."""
        locations = {name: where for name, where in self._locations.items() if name.startswith(prefixes)}
        return Checkpoint(self.path, locations, self._files, self.rejection)

    def rename(self, map_name: Callable[[str], str]) -> "Checkpoint":
        """Return a checkpoint with renamed tensors, without tensors renamed to ""; it shares open files."""
        locations = {map_name(name): where for name, where in self._locations.items() if map_name(name)}
        return Checkpoint(self.path, locations, self._files, self.rejection)

    def join(self, second: "Checkpoint") -> "Checkpoint":
        """Return a checkpoint with the tensors of both; `self` takes precedence. It shares the open files."""
        locations = {**second._locations, **self._locations}
        files = [*self._files, *second._files]
        return Checkpoint(self.path, locations, files, self.rejection or second.rejection)


def open_file(path: Path) -> TensorFile:
    """Open a file by its content, not its suffix.

    Raises:
        CheckpointError: If the file is damaged or not a model.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            start = file.read(16)
        if not start:
            raise CheckpointError(f"{path} is empty. Download or copy it again.", path)
        if start[:4] == GGUF:
            from checkpoints.gguf_files import GgufFile  # only for GGUF

            return GgufFile(path)
        if start[8:9] == b"{":  # checked first: the 8 length bytes before it may look like a pickle
            return SafetensorsFile(path)
        if start[:4] == ZIP or start[:1] == PICKLE:
            return TorchFile(path)
        if is_pointer_or_page(start):
            raise CheckpointError(f"{path} {describe_kind(start)}", path)
        if path.suffix in {".safetensors", ".sft"}:  # damaged; opening it raises an error that says how
            return SafetensorsFile(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    raise CheckpointError(f"{path} {describe_kind(start)}", path)


def open_checkpoint(
    path: Path,
    parts: Sequence[Path] | None = None,
    are_equal: Callable[[TensorFile, TensorFile, str], bool] = lambda *_: False,
) -> Checkpoint:
    """Open a model file, any shard of a model, an index of shards, or a folder with one of these.

    Args:
        path: The file or folder.
        parts: All files of the model, if `path` alone does not identify them.
        are_equal: Gets two files that both have a tensor, and its name; returns whether both tensors are
            equal, so that the first can be used. By default, such files are rejected.

    Raises:
        CheckpointError: If a file is missing, incomplete, damaged, not a model, or contains code.
    """
    files: list[TensorFile] = []
    locations: dict[str, Location] = {}
    try:
        for part in checkpoint_paths(path) if parts is None else parts:
            file = open_file(part)
            files.append(file)
            for name in file.tensors:
                if name not in locations:
                    locations[name] = (file, name)
                elif not are_equal(locations[name][0], file, name):
                    raise CheckpointError(
                        f"{path}: {name} is in two files, {locations[name][0].path.name} and {part.name}. "
                        "Pass one file.",
                        path,
                    )
        if not locations:
            raise CheckpointError(f"{path} contains no tensors.", path)
    except BaseException:
        for file in files:
            file.close()
        raise
    # packed weights are marked by extra tensors or in the metadata of a file
    has_marks = any(name.endswith(COMFY_QUANT_SUFFIX) or BNB_STATE_INFIX in name for name in locations)
    if has_marks or any(COMFY_QUANT_KEY in file.metadata for file in files):
        rejection = _register_packed_weights(path, locations, files)
        return Checkpoint(path, locations, files, rejection)
    return Checkpoint(path, locations, files)


def checkpoint_paths(path: Path) -> list[Path]:
    """Return all files of the model at a path (a file, shard, index or folder), in order.

    Raises:
        CheckpointError: If a file is missing.
    """
    if path.is_dir():
        # The files of the only model in a folder: files in an index, all shards, or a single file
        indexes = sorted(path.glob("*.index.json"))
        if len(indexes) == 1:
            return _read_index(indexes[0])
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if indexes:
            raise _make_ambiguity_error(path, indexes + files)
        safetensors = [file for file in files if file.suffix in {".safetensors", ".sft"}]
        if len(safetensors) == 1 or (
            safetensors and all(_SHARD.fullmatch(file.name) for file in safetensors)
        ):
            require_all_shards(safetensors)
            return safetensors
        if len(files) == 1:
            return files
        raise _make_ambiguity_error(path, files)
    try:
        require_regular_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: there is no such file or folder.{explain_missing(path)}", path
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Pass the model's file.", path
        ) from error
    if path.name.endswith(".index.json"):
        return _read_index(path)
    if _SHARD.fullmatch(path.name):
        return _require_neighbors(path, _list_shards(path.name))
    return [path]


def _make_ambiguity_error(folder: Path, candidates: Sequence[Path]) -> CheckpointError:
    """Return the error for a folder without exactly one model; it lists the `candidates`."""
    names = ", ".join(file.name for file in candidates[:MAX_LISTED_NAMES])
    if len(candidates) > MAX_LISTED_NAMES:
        names += ", ..."
    return CheckpointError(
        f"{folder} is a folder without exactly one model (model files: {names or 'none'}). Pass the path "
        "of the file.",
        folder,
    )


def is_sharded(path: Path) -> bool:
    """Return whether a path is part of a sharded model: a shard, an index or a folder."""
    return path.is_dir() or path.name.endswith(".index.json") or _SHARD.fullmatch(path.name) is not None


def require_all_shards(files: Sequence[Path]) -> None:
    """Raise CheckpointError if shards are missing, as file names such as 00002-of-00003 show."""
    for file in files:
        if _SHARD.fullmatch(file.name):
            _require_neighbors(file, _list_shards(file.name))


@lru_cache(maxsize=4)
def _list_shards(name: str) -> list[str]:
    """Return the file names of all shards of a model, given the file name of one shard."""
    shard = _SHARD.fullmatch(name)
    assert shard is not None
    count = int(shard["count"])
    return [f"{shard['stem']}-{number:05d}-of-{count:05d}{shard['suffix']}" for number in range(1, count + 1)]


def _read_index(path: Path) -> list[Path]:
    """Return the files listed in an index of shards; all must be in the index's folder or below."""
    try:
        names = set()
        for name in parse_json(read_text(path))["weight_map"].values():
            relative = Path(name)
            if relative.is_absolute() or relative.drive or ".." in relative.parts:
                raise ValueError(f"{shorten(name, MAX_NAME_LENGTH)} is not in its folder")
            names.add(str(relative))
        if len(names) > MAX_SHARDS:
            raise ValueError(f"it names {len(names):,} files, but no model has more than {MAX_SHARDS:,}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not an index of model files: {error!r}. Pass the first of the files instead.", path
        ) from error
    return _require_neighbors(path, sorted(names))


def _require_neighbors(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of files next to `path`; raise CheckpointError if some are missing."""
    missing = []
    for name in names:
        with contextlib.suppress(OSError):  # a malformed index may have a name that is too long
            if (path.parent / name).is_file():
                continue
        missing.append(name)
    if missing:
        listed_names = ", ".join(shorten(name, MAX_NAME_LENGTH) for name in missing[:MAX_LISTED_NAMES])
        if len(missing) > MAX_LISTED_NAMES:
            listed_names += ", ..."
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(names)} files are not next to it: {listed_names}.", path
        )
    return [path.parent / name for name in names]


# chunks that `fingerprint` hashes
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def fingerprint(path: Path) -> str:
    """Return a hash of parts of a model, for cache records.

    The hash covers the size, the first MB, and evenly spaced chunks of each file, about 2 MB in all.

    Raises:
        CheckpointError: If a file cannot be opened.
    """
    digest = hashlib.sha256()
    for part in checkpoint_paths(path):
        try:
            with part.open("rb") as file:
                size = part.stat().st_size
                digest.update(size.to_bytes(8, "little"))
                digest.update(file.read(1 << 20))  # includes a safetensors header
                last_start = max(0, size - _SAMPLE_BYTES)
                for sample in range(_NUM_SAMPLES):
                    file.seek(last_start * sample // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"{part} cannot be read: {error.strerror or error}.", path) from error
    return digest.hexdigest()[:32]


_SCALES = (".scale_weight", ".weight_scale")  # suffixes of scales
# patterns of tensors that are not needed once the weights are dequantized
QUANTIZATION_EXTRAS = (
    "scaled_fp8",
    "*.scale_input",
    "*.input_scale",
    f"*{COMFY_QUANT_SUFFIX}",
    "*.weight.quant_map",
    "*.weight.quant_state.*",
)
_is_extra = re.compile("|".join(map(fnmatch.translate, QUANTIZATION_EXTRAS))).match
# suffix of a tensor name -> quantization that is not supported, at least without a mark or state in the file.
# Sources: files of these packages, layouts of comfy-kitchen
_UNSUPPORTED = {
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "asym_w4a8_int8",
    ".weight_zeros": "awq_w4a16",
    ".absmax": "4 bits of bitsandbytes without a state",
    ".SCB": "int8 of bitsandbytes",
    **dict.fromkeys((".wscales", ".smooth_factor"), "SVDQuant of nunchaku"),
    **dict.fromkeys((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ".weight._data": "quanto",
    ".entropack_quant_state": "EntroPack",
    ".W_q": "HQQ",
    "_weight_qdata": "torchao",
    ".weight_scale_inv": "fp8 in blocks",
}


def reject_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if weights are quantized in an unsupported format.

    Call it before shapes are compared, because packed weights have different shapes. No weights are read.
    """
    if checkpoint.rejection:
        remedy = "Download or copy it again, or pass the bf16 file of the model."
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.rejection}.\n  {remedy}", checkpoint.path)
    form = _find_unsupported_form(checkpoint.tensors)
    if form:
        raise CheckpointError(
            f"{checkpoint.path} is quantized in a way that is not supported ({form}). Pass the bf16, fp16 or "
            "fp8 file of the model, or a file quantized by ComfyUI, bitsandbytes or as GGUF.",
            checkpoint.path,
        )


def _register_packed_weights(
    path: Path, locations: Mapping[str, Location], files: Sequence[TensorFile]
) -> str:
    """Mark packed (quantized) tensors in the open files; return an error message for later, or ""."""
    from checkpoints.marks import find_packed  # only for packed weights

    checkpoint = Checkpoint(path, locations, files)
    try:
        for name, info in find_packed(checkpoint.tensors, checkpoint.metadata, checkpoint.read).items():
            file, stored_name = locations[name]
            file.tensors[stored_name] = info
    except (ValueError, RecursionError) as error:
        return str(error)  # raised by `reject_quantized`, once weights are needed
    return ""


def list_companions(name: str, info: TensorInfo) -> tuple[str, ...]:
    """Return the names of the tensors that a packed weight needs in addition, such as its scales."""
    assert info.packing is not None
    return tuple(name.removesuffix("weight") + end for end in info.packing.companion_suffixes)


def _find_unsupported_form(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Describe an unsupported quantization by a tensor that reveals it; return None if there is none."""
    is_packed = any(info.packing is not None for info in tensors.values())
    unrecognized = _without_packed(tensors) if is_packed else tensors
    suspects = [name for name in unrecognized if name.endswith(tuple(_UNSUPPORTED))]
    for suffix, format_name in _UNSUPPORTED.items():
        for name in suspects:
            if name.endswith(suffix):
                return f"{format_name}: it has {name}"
    for name, info in unrecognized.items():
        if name.endswith(_SCALES) and (len(info.shape) == 2 and min(info.shape) > 1):
            is_float = info.dtype.is_floating_point and info.dtype.itemsize > 1
            format_name = "fp8 in blocks" if is_float else "mxfp8"
            return f"{format_name}: it has {name} {list(info.shape)}"
        if name.endswith(".weight") and len(info.shape) > 1 and not info.dtype.is_floating_point:
            return f"{dtype_name(info.dtype)}: {name} has this dtype"
    # a quantized weight without a known suffix is recognized by dtype and shape
    for name, info in unrecognized.items():
        is_narrow = info.dtype.itemsize == 1 or not info.dtype.is_floating_point
        if is_narrow and _is_packed_weight(name, tensors):
            kind = dtype_name(info.dtype)
            return f"quantized in an unknown format: it has {name} in {kind} instead of a weight"
    return None


def _without_packed(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors without packed (quantized) weights of known formats and without their scales."""
    packed: set[str] = set()
    for name, info in tensors.items():
        if info.packing is not None:
            packed.add(name)
            packed.update(list_companions(name, info))
    return {name: info for name, info in tensors.items() if name not in packed}


_TABLES = ("_ids", "_index", "_ind")  # suffixes of tables of integers, which are not quantized weights


def _is_packed_weight(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether an integer or fp8 tensor looks like a layer's quantized weight."""
    info = tensors[name]
    layer, separator, _ = name.partition(".weight.")  # as in blocks.0.q.weight.data
    if not separator:
        layer = name.rpartition(".")[0]
    if not layer or info.dtype is torch.bool:
        return False
    is_matrix = len(info.shape) > 1 and min(info.shape) > 1
    is_named_weight = name.removeprefix(f"{layer}.").startswith(("weight", "qweight"))
    if not is_matrix and not is_named_weight:
        return False
    # a layer that has its weight too is not quantized
    return f"{layer}.weight" not in tensors and not name.endswith((*_TABLES, ".weight"))


def list_tensor_sources(checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """Return how each tensor is read from the file, by its name in the file.

    Scaled fp8 weights are multiplied by their scales, and packed weights are unpacked. Scales and other
    companions of these weights have no source of their own.

    Raises:
        CheckpointError: If the file's quantization is not supported.
    """
    reject_quantized(checkpoint)
    scales = find_scales(checkpoint.tensors)
    packed = {name: info for name, info in checkpoint.tensors.items() if info.packing is not None}
    companions = set(scales.values())
    for name, info in packed.items():
        companions.update(list_companions(name, info))
    sources = {}
    for name, info in checkpoint.tensors.items():
        if name in packed:
            sources[name] = _make_packed_source(checkpoint.path, name, info)
            continue
        if name in companions or _is_extra(name):
            continue
        in_fp8 = info.dtype.itemsize == 1 and info.dtype.is_floating_point
        if name in scales or in_fp8:
            sources[name] = _make_scaled_source(name, scales.get(name), in_fp8)
        else:
            sources[name] = TensorSource((name,))
    return sources


def _make_scaled_source(name: str, scale: str | None, in_fp8: bool) -> TensorSource:
    """Return the source of a weight in fp8, or of any weight that has a scale."""
    # A layer may keep fp8 weights as they are; other scaled weights are always dequantized.
    from checkpoints.stored import fp8  # only for fp8 or scaled weights

    build_quantized = fp8.make_fp8_weight if in_fp8 else None
    if scale is None:
        return TensorSource((name,), None, build_quantized)
    return TensorSource((name, scale), fp8.dequantize, build_quantized)


def _make_packed_source(path: Path, name: str, info: TensorInfo) -> TensorSource:
    """Return the source of a packed weight; reading it raises CheckpointError if its tensors do not fit."""
    assert info.packing is not None
    make_quantized = info.packing.make_quantized

    def build_quantized(*tensors: Tensor) -> QuantizedWeight:
        try:
            return make_quantized(*tensors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name} {error}. Download or copy it again.", path) from error

    def build_dequantized(*tensors: Tensor) -> Tensor:
        if tensors[0].device.type == "meta":
            return torch.empty(info.shape, device="meta")
        return build_quantized(*tensors).dequantize().view(info.shape)

    names = name, *list_companions(name, info)
    can_stay_quantized = len(info.shape) == 2 and info.packing.can_stay_quantized
    return TensorSource(names, build_dequantized, build_quantized if can_stay_quantized else None)


def find_scales(names: Iterable[str]) -> dict[str, str]:
    """Map each quantized weight's name to the name of its scale."""
    scales = {}
    for name in names:
        for suffix in _SCALES:
            if name.endswith(suffix):
                scales[name.removesuffix(suffix) + ".weight"] = name
    return scales
