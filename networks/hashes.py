"""Checksums in the metadata of LoRA files: those that model browsers look up, and one that shows damage."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000
LAYOUT_KEY = "reelsmith_layout"
STALE = ("sshs_", "modelspec.hash_sha256", LAYOUT_KEY)  # metadata of other tensors: how hashes in them begin


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash` of these tensors.

    The first is SHA-256 over the data part of a safetensors file. The second is the first 8 digits of SHA-256
    over 64 KiB at 1 MiB of a file that has only the `ss_*` metadata. Other metadata change neither.
    """
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = memoryview(safetensors.torch.save(ready, own))
    header_bytes = int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[8 + header_bytes :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[LEGACY_START : LEGACY_START + LEGACY_BYTES]).hexdigest()[:8],
    }


def add_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the hashes of these tensors, replacing older ones; `is_damaged` reads them."""
    return {**metadata, **model_hashes(tensors, metadata), LAYOUT_KEY: layout_hash(tensors)}


def layout_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of names, dtypes and shapes."""
    lines = sorted(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:16]


def is_damaged(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the data of a safetensors file written here differ from its checksum.

    A tool that renames or casts tensors may copy old hashes, so the hashes are checked only if names, dtypes
    and shapes are as written here.
    """
    if metadata.get(LAYOUT_KEY) != layout_hash(tensors) or "sshs_model_hash" not in metadata:
        return False
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest() != metadata["sshs_model_hash"]


def saved_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copy tensors to the CPU in the file's dtype; None keeps the dtype of each."""
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
