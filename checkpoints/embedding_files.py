"""Read files of embeddings (textual inversion), the vectors of a word, without running code."""
# Letters: V vectors of a word, C width of a text encoder

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import ParameterDict

from checkpoints.containers import load_pickled
from checkpoints.opening import open_checkpoint
from modules.control_codes import shorten
from modules.errors import CheckpointError
from modules.limits import MAX_EMBEDDING_BYTES
from modules.paths import explain_missing

_SAFETENSORS = (".safetensors", ".sft")
TABLE = "string_to_param"  # key of the vectors in files of the Web UI and of the paper's own code


def reject_embedding(path: Path, option: str, why: str) -> CheckpointError:
    """Return the error for a file that is not a textual inversion embedding.

    Args:
        path: The file.
        option: Option that sets the path.
        why: Reason, for the message.
    """
    return CheckpointError(
        f"{option} {path} is not a textual inversion: {why}. Pass a file with emb_params, with clip_l and "
        "clip_g, with string_to_param, or with the vectors of one word.",
        path,
    )


def read_embedding(path: Path, option: str) -> Mapping[str, Any]:
    """Return everything in a one-word embedding file by name: tensors, or dictionaries of tensors.

    Args:
        path: The file.
        option: Option that sets the path, for messages.

    Raises:
        CheckpointError: If the file is missing, damaged or too large, or if it contains code.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{option} {path}: there is no such file.{explain_missing(path)} Pass an existing file.", path
        )
    if path.stat().st_size > MAX_EMBEDDING_BYTES:
        raise reject_embedding(path, option, f"it has {path.stat().st_size >> 20} MiB")
    if path.suffix.lower() in _SAFETENSORS:
        with open_checkpoint(path) as checkpoint:
            return {name: checkpoint.read(name) for name in checkpoint.tensors}
    with torch.serialization.safe_globals([ParameterDict]):  # files written by the paper's code contain one
        content = load_pickled(path)
    if not isinstance(content, Mapping):
        raise reject_embedding(path, option, f"it contains a {type(content).__name__}")
    tables = {}
    try:
        for name, value in content.items():
            tables[str(name)] = dict(value) if isinstance(value, ParameterDict) else value
        return tables
    except Exception as error:  # a damaged ParameterDict may raise any exception
        raise reject_embedding(path, option, f"its string_to_param is damaged ({error})") from error


def list_tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return only those values of an unpickled file that are tensors, by name."""
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def describe_content(content: Mapping[str, Any]) -> str:
    """List the first names in a file, for the error message that it is not an embedding."""
    if not content:
        return "it is empty"
    first_names = ", ".join(shorten(name, 60) for name in sorted(content)[:4])
    dots = ", ..." if len(content) > 4 else ""
    return f"it contains {first_names}{dots}"


def to_rows(
    path: Path,
    option: str,
    tensors: Mapping[str, Tensor],
    reject: Callable[[Path, str, str], CheckpointError] = reject_embedding,
) -> dict[str, Tensor]:
    """Return tensors as rows of vectors under the same names, each V x C float32.

    Args:
        path: The file.
        option: Option that sets the path.
        tensors: Tensors of the file.
        reject: Returns the error for a file that is not an embedding, given path, option and reason.

    Raises:
        CheckpointError: If a tensor has a different shape, or non-finite values.
    """
    for name, tensor in tensors.items():
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        is_rows = is_plain and tensor.is_floating_point() and tensor.ndim in (1, 2)
        # checked again: rows with a stride of 0 share memory, so a tensor may be larger than the file
        size_bytes = tensor.numel() * tensor.element_size()
        if not is_rows or not 0 < size_bytes <= MAX_EMBEDDING_BYTES:
            raise reject(path, option, f"{shorten(name, 60)} is not a row of vectors: {tuple(tensor.shape)}")
        if not tensor.float().isfinite().all():  # cast, because fp8 has no isfinite
            raise CheckpointError(
                f"{option} {path}: it contains values that are NaN or infinite. Fetch or train it again.",
                path,
            )
    return {name: torch.atleast_2d(tensor.float()) for name, tensor in tensors.items()}
