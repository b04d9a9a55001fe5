"""Run ONNX files by onnxruntime, within bounded memory and time, without opening other files."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules import limits
from modules.control_codes import shorten
from modules.errors import CheckpointError, InstallationError
from modules.memory_limit import limited_memory
from modules.paths import explain_missing
from modules.text_files import require_regular_file

Shape = tuple[int | None, ...]  # None: any size
Array = NDArray[np.float32]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class OnnxModel:
    """A loaded ONNX model with a single input, the shapes of its tensors, and its metadata."""

    path: Path
    input_shape: Shape
    outputs: Mapping[str, Shape]  # by name
    notes: Mapping[str, str]  # metadata
    session: Any  # onnxruntime.InferenceSession
    memory_bytes: int | None  # memory limit of a run; None on a GPU, which has its own limit

    def run(self, images: Array) -> list[Array]:
        """Return the outputs for some images, in the order of `outputs`.

        Raises:
            CheckpointError: If the network fails, or exceeds its limit of memory or time.
        """
        import onnxruntime

        (model_input,) = self.session.get_inputs()
        options = onnxruntime.RunOptions()
        try:
            with limited_memory(self.memory_bytes), _limited_time(options, len(images)):
                outputs = self.session.run(
                    None, {model_input.name: images.astype(_DTYPES[model_input.type])}, options
                )
        except Exception as error:  # onnxruntime's errors have no common base class
            raise _cannot_run(self.path, error) from None
        return [np.asarray(output, np.float32) for output in outputs]


def may_be_onnx(path: Path) -> bool:
    """Return whether a file begins like ONNX, or is named .onnx and does not begin like another model.

    Raises:
        CheckpointError: If it cannot be read.
    """
    if path.is_dir():
        return False
    _require_file(path)
    with path.open("rb") as file:
        start = file.read(16)
    is_other = start[8:9] == b"{" or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    return not is_other and (start[:1] == b"\x08" or path.suffix.lower() == ".onnx")


def load_onnx(path: Path, more_bytes: int = 0, may_use_cuda: bool = False) -> OnnxModel:
    """Load an ONNX file.

    Args:
        path: Path of the file.
        more_bytes: Memory that a run may take besides `MAX_ONNX_MEMORY` and the weights.
        may_use_cuda: Whether to use CUDA if this onnxruntime can; else the CPU runs it.

    Raises:
        CheckpointError: If it is damaged, has other inputs than images, or exceeds the memory limit.
        InstallationError: If onnxruntime is missing.
    """
    size = _require_file(path)
    try:
        import onnxruntime
    except ImportError:
        raise InstallationError(
            f"{path.name} needs the package onnxruntime. Run: pip install onnxruntime"
        ) from None
    providers = ["CPUExecutionProvider"]
    max_bytes = limits.MAX_ONNX_MEMORY + 3 * size + more_bytes  # the session stores weights in another layout
    memory_bytes: int | None = max_bytes
    if may_use_cuda and _CUDA in onnxruntime.get_available_providers():
        providers.insert(0, _CUDA)
        memory_bytes = None  # the GPU has its own limit
    settings = _make_settings(onnxruntime, max_bytes)
    try:
        with limited_memory(memory_bytes):
            session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:  # errors of onnxruntime have no common base class
        if "InvalidProtobuf" in type(error).__name__ or not size:
            raise CheckpointError(
                f"{path} is not an ONNX file, or it is damaged. Download or export it again.", path
            ) from None
        raise _cannot_run(path, error) from None
    return OnnxModel(
        path=path,
        input_shape=_read_input(path, session),
        outputs={output.name: _read_shape(output) for output in session.get_outputs()},
        notes=session.get_modelmeta().custom_metadata_map,
        session=session,
        memory_bytes=memory_bytes,
    )


def _make_settings(onnxruntime: Any, memory_bytes: int) -> Any:
    """Return onnxruntime session options that limit the memory for tensors, on every system."""
    memory_info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    bound = onnxruntime.OrtArenaCfg({"max_mem": memory_bytes, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(memory_info, bound)  # replaces an earlier allocator
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # fatal: errors are raised
    settings.add_session_config_entry("session.use_env_allocators", "1")
    return settings


def _read_input(path: Path, session: Any) -> Shape:
    """Return the shape of a model's only input; raise CheckpointError unless that input is an image."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _DTYPES:
        inputs_text = (
            ", ".join(f"{model_input.name}: {model_input.type}" for model_input in inputs[:4]) or "nothing"
        )
        raise CheckpointError(f"{path} cannot be used: it requires {inputs_text}, not just images.", path)
    shape = _read_shape(inputs[0])
    if any(size is not None and size > limits.MAX_ONNX_SIDE for size in shape[1:]):
        raise CheckpointError(
            f"{path} cannot be used: its input {inputs[0].name} has the shape {list(shape)[:8]}.", path
        )
    return shape


def _read_shape(value: Any) -> Shape:
    return tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape)


@contextlib.contextmanager
def _limited_time(options: Any, count: int) -> Iterator[None]:
    """End the ONNX run in the `with` block if it takes too long, because loops in a graph may be endless."""

    def end() -> None:
        options.terminate = True

    timer = threading.Timer(limits.MAX_ONNX_SECONDS * count, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cannot_run(path: Path, error: Exception) -> CheckpointError:
    why = " ".join(str(error).split())
    if "AllocateRaw" in why or "bad_alloc" in why:
        why = f"it needs more memory than such networks do. {why}"
    why = shorten(why, 300)
    return CheckpointError(f"{path} cannot be run by onnxruntime: {why}", path)


def _require_file(path: Path) -> int:
    """Return the size of a file. Raises CheckpointError if it is missing or not a regular file."""
    try:
        return require_regular_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.{explain_missing(path)}", path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error


def shapes_text(shapes: Mapping[str, Shape]) -> str:
    """Return the first names and shapes of a model's outputs, for messages."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:4])
