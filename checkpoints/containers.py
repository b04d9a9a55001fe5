"""Read files of named tensors: safetensors, and torch's zip or pickle files without running code.

Each reader lists its tensors without reading them. `borrow` then reads one tensor at a time, to be copied
immediately. A read error on an unreliable volume therefore raises an exception; in a memory-mapped file it
would crash the process.
"""

import itertools
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import torch
from torch import Tensor

from checkpoints.first_bytes import describe_kind
from modules.control_codes import shorten
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.limits import (
    MAX_ELEMENTS,
    MAX_PICKLE_BYTES,
    MAX_PICKLE_STEPS,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    MAX_WRAPPERS,
    SHORT_PICKLE_BYTES,
)
from modules.text_files import read_tensor_header, require_regular_file
from protocols.loading import TensorInfo

# first bytes of files written by `torch.save`, in its current and its older format
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
# what marks quantized layers
COMFY_QUANT_SUFFIX = ".comfy_quant"  # suffix of ComfyUI's tensors
COMFY_QUANT_KEY = "_quantization_metadata"  # ComfyUI's metadata key
BNB_STATE_INFIX = ".quant_state.bitsandbytes__"  # part of bitsandbytes' tensor names

# keys under which trainers store the tensors; averaged weights come first, because they are preferred
WRAPPERS = (
    "params_ema",
    "params-ema",
    "params",
    "module",
    "model_state_dict",
    "ema",
    "model",
    "state_dict",
)

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# other dtypes of safetensors, which are not supported: 4 and 6 bits, complex numbers
OTHER_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "C64")


def make_count_error(path: Path, num_tensors: int) -> CheckpointError:
    """Return the error for a file that lists more than MAX_TENSORS tensors."""
    return CheckpointError(
        f"{path} has {num_tensors:,} tensors, and no model has more than {MAX_TENSORS:,}. Pass the file of a "
        "model.",
        path,
    )


class HeaderFile:
    """Base class of files whose header lists the tensors."""

    left_out: Sequence[str] = ()  # names of entries that are not tensors
    header_name = "header"  # description of the header, for messages
    damage_errors: tuple[type[Exception], ...] = (ValueError,)  # errors raised by reading a damaged header

    def __init__(self, path: Path) -> None:
        """Open a file and read its header; raise CheckpointError if the header is damaged."""
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._offsets: dict[str, int] = {}  # name -> offset of the tensor in the file
        self._file = path.open("rb")
        self.close = self._file.close
        try:
            self._read_header(path.stat().st_size)
        except BaseException as error:
            self.close()
            if not isinstance(error, self.damage_errors):
                raise
            raise CheckpointError(
                f"{path} is damaged or incomplete: its {self.header_name} cannot be read ({error}). "
                "Download or copy it again.",
                path,
            ) from error

    def _read_header(self, size: int) -> None:
        """Read the header into `tensors`, `metadata` and `_offsets`; `size` is the file size in bytes."""
        raise NotImplementedError

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a tensor that must be copied at once, because it may be a view of `read_buffer` (uint8)."""
        info = self.tensors[name]
        return info.read(self._file, self._offsets[name], read_buffer=read_buffer, path=self.path, name=name)


class SafetensorsFile(HeaderFile):
    """Safetensors file read without the safetensors library, which memory-maps the whole file.

    Windows reserves as much memory for such a mapping and may fail with "the paging file is too small".
    """

    damage_errors = (ValueError, TypeError, KeyError, AttributeError)

    def _read_header(self, size: int) -> None:
        """Read the header of a safetensors file; raise ValueError if its values are inconsistent."""
        self.metadata, header, start = read_tensor_header(self._file.read, size, no_repeats=True)
        if len(header) > MAX_TENSORS:
            raise make_count_error(self.path, len(header))
        # raises UnicodeEncodeError (a ValueError) for lone surrogates, which an escape in JSON can produce
        "".join([*header, *self.metadata, *self.metadata.values()]).encode("utf-8")
        spans = []
        for name, entry in header.items():
            self.tensors[name] = self._read_entry(name, entry)
            begin, end = entry["data_offsets"]
            spans.append((begin, end, name))
            self._offsets[name] = start + begin
        # Check that there are no gaps or overlaps between tensors; return the end of the data
        previous_end = 0
        for begin, end, name in sorted(spans):
            if begin != previous_end:
                raise ValueError(f"the data of {name} begin at byte {begin}, not {previous_end}")
            previous_end = end
        described_size = start + previous_end
        if described_size != size:
            raise ValueError(f"the file has {size} bytes, but its header describes {described_size}")

    def _read_entry(self, name: str, entry: Any) -> TensorInfo:
        """Return the dtype and shape of a tensor from its JSON object in the header."""
        if len(name) > MAX_TENSOR_NAME:
            raise ValueError(f"a tensor has a name of {len(name)} characters, {shorten(name, 60)}")
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise self._make_dtype_error(name, entry["dtype"])
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has the shape {shape} at bytes {begin} to {end}")
        if math.prod(max(number, 1) for number in shape) > MAX_ELEMENTS:
            raise ValueError(f"{name} has the impossible shape {shape}")
        info = TensorInfo(dtype, tuple(shape))
        if end - begin != info.size_bytes:
            raise ValueError(f"{name} has {end - begin} bytes for shape {list(shape)}")
        return info

    def _make_dtype_error(self, name: str, kind: str) -> Exception:
        """Return the error for a tensor whose dtype is not supported."""
        if kind in OTHER_DTYPES:
            return CheckpointError(
                f"{self.path} is quantized: {name} is of type {kind}, which is not supported. "
                "Pass the bf16, fp16 or fp8 file of the model.",
                self.path,
            )
        return ValueError(f"{name} has the unknown type {kind}")


class TorchFile:
    """A file written by `torch.save`; it is memory-mapped, and unpickled without running code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        content = load_pickled(path)
        self._tensors, self.left_out = _find_tensors(content, set())
        if not self._tensors:
            raise CheckpointError(
                f"{path} contains no named tensors ({type(content).__name__}). Pass a model's state dict.",
                path,
            )
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()
        }
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Raise CheckpointError if the name, dtype or size of a tensor is impossible for a model."""
        path = self.path
        size = path.stat().st_size
        try:
            "".join(self.tensors).encode("utf-8")
        except UnicodeEncodeError as error:  # such a name can be neither displayed nor written
            raise _make_damage_error(path, f"a tensor's name is not text ({error})") from error
        for name, info in self.tensors.items():
            if len(name) > MAX_TENSOR_NAME:
                reason = f"a tensor has a name of {len(name)} characters, {shorten(name, 60)}"
                raise _make_damage_error(path, reason)
            if info.dtype not in SAFETENSORS_DTYPES.values():
                raise CheckpointError(
                    f"{path}: {name} is of type {dtype_name(info.dtype)}. {_DENSE_ONLY_ADVICE}", path
                )
            # with strides of 0, a few bytes can have a huge shape
            if info.size_bytes > size:
                raise CheckpointError(
                    f"{path} is damaged: {name} takes {info.size_bytes} bytes, the whole file {size}.", path
                )

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a view of the memory-mapped tensor; `read_buffer` is not used."""
        # the dtype in `tensors` is fp8 if `checkpoints.marks` has recognized fp8 stored as uint8
        return self._tensors[name].detach().view(self.tensors[name].dtype)

    def close(self) -> None:
        """Release all tensors, which unmaps the file from memory."""
        self._tensors = {}


TensorFile: TypeAlias = HeaderFile | TorchFile  # one open file of named tensors


def load_pickled(path: Path, limit_factor: int = 1) -> Any:
    """Load a file written by `torch.save` without running code, memory-mapped if its format allows it.

    `limit_factor` multiplies the allowed length of the pickle program, for files with more objects than a
    model has.

    Raises:
        CheckpointError: If the file contains code or unusual tensors (such as sparse ones), or is damaged.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error
    if start and start[:4] != ZIP and start[:1] != PICKLE:
        raise CheckpointError(f"{path} {describe_kind(start)}", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the pickle protocol
            if start[:4] == ZIP:
                _check_program(path, limit_factor)
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:  # the older format cannot be memory-mapped
                with path.open("rb") as file:
                    limited_file = cast(Any, _ReadLimitedFile(file, limit_factor))
                    content = torch.load(limited_file, map_location="cpu", weights_only=True)
        # Raise CheckpointError if a tensor in a pickled file is sparse, nested, quantized or without data
        waiting: list[tuple[str, Any]] = [("", content)]
        visited: set[int] = set()  # a malicious file may nest a container in itself
        while waiting:
            name, value = waiting.pop()
            if isinstance(value, (dict, list, tuple, set, frozenset)) and id(value) not in visited:
                visited.add(id(value))
                inner = value.items() if isinstance(value, dict) else enumerate(value)
                waiting += [(f"{name}.{key}".lstrip("."), item) for key, item in inner]
            if isinstance(value, Tensor):
                kind = _name_special_kind(value)
                if kind is not None:
                    raise CheckpointError(
                        f"{path}: {name or 'its tensor'} is {kind}. {_DENSE_ONLY_ADVICE}", path
                    )
        return content
    except pickle.UnpicklingError as error:
        raise _explain_unpickling_error(path, error) from error
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # torch raises many types of errors for a damaged file
        raise _make_damage_error(path, str(error) or type(error).__name__) from error


def _explain_unpickling_error(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Return the error for a damaged file or a file with code; only torch's message tells them apart."""
    damaged_opcode = re.search(r"Unsupported operand \d+", str(error))
    if damaged_opcode is not None:
        return _make_damage_error(path, damaged_opcode[0])
    if "weights_only" not in str(error):
        return _make_damage_error(path, str(error))
    forbidden_class = re.search(r"GLOBAL ([\w.]+)", str(error))
    request = "" if forbidden_class is None else f"It asks for {forbidden_class[1]}. "
    return CheckpointError(
        f"{path} contains program code in addition to its tensors and is refused: opening it would run that "
        f"code.\n  {request}Use a safetensors version of the file.",
        path,
    )


class _ReadLimitedFile:
    """Wraps a file and limits the number of reads: torch reads a pickle instruction by instruction."""

    def __init__(self, file: BinaryIO, limit_factor: int) -> None:
        self._file = file
        self._num_reads = 0
        self._max_reads = limit_factor * MAX_PICKLE_STEPS

    def read(self, *size: int) -> bytes:
        self._num_reads += 1
        if self._num_reads > self._max_reads:
            raise ValueError(_TOO_LONG)
        return self._file.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_TOO_LONG = "its list of tensors and values is longer than in any model"


def _check_program(path: Path, limit_factor: int) -> None:
    """Raise ValueError if the pickle program in a zip file would take too much time or memory."""
    # `limit_factor` multiplies the limits.
    max_steps = limit_factor * MAX_PICKLE_STEPS
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            is_program = info.filename.rpartition("/")[2] == "data.pkl"
            if not is_program or info.file_size <= SHORT_PICKLE_BYTES:
                continue
            # torch.save does not compress, so a compressed program was made to expand in memory
            if info.file_size > limit_factor * MAX_PICKLE_BYTES or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(_TOO_LONG)
            steps = pickletools.genops(archive.read(info))
            num_steps = sum(1 for _ in itertools.islice(steps, max_steps + 1))
            if num_steps > max_steps:
                raise ValueError(_TOO_LONG)


_DENSE_ONLY_ADVICE = (
    "Only plain weights can be read: save them as dense tensors, preferably in a safetensors file."
)


def _name_special_kind(tensor: Tensor) -> str | None:
    """Return what makes a tensor unusual, such as "sparse"; None for a plain dense tensor."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return f"a quantized tensor ({dtype_name(tensor.dtype)})"
    if tensor.device.type != "cpu":
        return f"a tensor without data ({tensor.device.type})"
    return None


def _make_damage_error(path: Path, reason: str) -> CheckpointError:
    """Return the error for a damaged file, with the first sentence of torch's reason."""
    first_sentence = reason.strip().splitlines()[0].split(". ")[0]
    return CheckpointError(
        f"{path} is damaged or incomplete: {first_sentence}. Download or copy it again.", path
    )


def _find_tensors(content: Any, visited: set[int]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors in a file's content, and the names of everything else."""
    # If the content has a wrapper dictionary such as `state_dict`, only the tensors in it are returned,
    # because tensors next to it may be step counts.
    if not isinstance(content, dict) or id(content) in visited or len(visited) == MAX_WRAPPERS:
        return {}, []
    visited.add(id(content))
    wrappers = [*WRAPPERS, *content] if len(content) == 1 else WRAPPERS  # a single entry may have any name
    for key in wrappers:
        inner_tensors, inner_others = _find_tensors(content.get(key), visited)
        if inner_tensors:
            return inner_tensors, [str(name) for name in content if name != key] + inner_others
    tensors: dict[str, Tensor] = {}
    other_names: list[str] = []
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        else:
            other_names.append(str(name))
    return tensors, other_names
