"""Metadata of LoRA files: the expert of a file, checksums that model browsers look up."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from modules.atomic_write import save_tensors
from modules.contract.rules import expert_of_file, named_expert
from modules.text_files import parse_json
from networks.module_names import FAMILIES
from networks.names.layouts import EXPERT_VALUES, FOR_BOTH, IN_DIFFUSERS, TRAINED_EXPERT

# what a LoRA file with a part for each expert says of single parts: {"high_noise": {...}, ...} as JSON
PARTS_METADATA = "reelsmith_experts"
# where pipelines of diffusers keep the experts' networks, also what names of tensors then begin with
NETWORKS = {f"{network}.": expert for family in FAMILIES for network, expert in family.experts}


def expert_of(metadata: Mapping[str, str], path: Path) -> str | None:
    """Return the expert that a LoRA was trained for, or FOR_BOTH; None if unknown.

    Metadata count before the file's name: `x_high_noise.safetensors`, `x-HIGH-v2.safetensors`.
    """
    value = metadata.get(TRAINED_EXPERT, "").strip().lower()
    if value == FOR_BOTH:
        return FOR_BOTH
    return EXPERT_VALUES.get(value) or named_expert(path.stem)


def expert_of_model(path: Path) -> str | None:
    """Return the expert that a model's file or folder holds, by its name or its folder's; None if unknown.

    `high_noise_model/` is the official repository's, `transformer/` beside `transformer_2/` diffusers'.
    """
    return expert_of_file(path, {start.removesuffix("."): expert for start, expert in NETWORKS.items()})


def in_words(expert: str) -> str:
    """`high_noise` -> `high-noise expert`."""
    return f"{expert.replace('_', '-')} expert"


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensors of a LoRA file by expert; {None: all} if the file has no parts for experts.

    A file has them if names begin with those of further networks in a pipeline of diffusers.
    """
    names = list(names)
    found: dict[str | None, list[str]] = {}
    if not any(name.startswith(further_networks()) for name in names):
        return {None: names}
    for name in names:
        start = next((start for start in NETWORKS if name.startswith(start)), IN_DIFFUSERS)
        found.setdefault(NETWORKS[start], []).append(name)
    return found


def further_networks() -> tuple[str, ...]:
    """Return how names begin that are of another than the first network of a pipeline."""
    return tuple(start for start in NETWORKS if start != IN_DIFFUSERS)


def metadata_of(metadata: Mapping[str, str], expert: str) -> dict[str, str]:
    """Return the metadata of one part of a file with a part for each expert, which name the expert.

    Raises ValueError if the file's metadata of its parts are unreadable.
    """
    common = {key: value for key, value in metadata.items() if key != PARTS_METADATA}
    own = parse_json(metadata.get(PARTS_METADATA, "{}")).get(expert, {})
    value = next(value for value, name in EXPERT_VALUES.items() if name == expert)
    return {**common, **{str(key): str(text) for key, text in own.items()}, TRAINED_EXPERT: value}


def join_metadata(parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return metadata for a file with a part for each expert; `metadata_of` takes them apart again.

    parts: expert -> its metadata.
    """
    plain = [{key: value for key, value in one.items() if key != TRAINED_EXPERT} for one in parts.values()]
    common = {key: value for key, value in plain[0].items() if all(one.get(key) == value for one in plain)}
    own = {
        expert: {key: value for key, value in one.items() if key not in common}
        for expert, one in zip(parts, plain, strict=True)
    }
    if not any(own.values()):
        return common
    return {**common, PARTS_METADATA: json.dumps(own, ensure_ascii=False, sort_keys=True)}


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


def save_network(
    module: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write a network to a file, completely or not at all, with hashes added to the metadata.

    dtype: of the tensors in the file; None: as trained.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()
    }
    save_tensors(path, tensors, add_hashes(tensors, metadata))
