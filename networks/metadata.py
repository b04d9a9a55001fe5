"""Metadata of LoRA files: their expert, the checksums that model browsers look up, a one-line description."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from checkpoints.opening import Checkpoint
from checkpoints.writing import save_tensors
from modules.console import format_count
from modules.errors import CheckpointError
from modules.text_files import parse_json
from networks.kinds.composing import KIND_BY_FACTOR, MAGNITUDE_KIND_NAME, MAGNITUDES, sizes_by_word
from networks.kinds.contract import named
from networks.kinds.factors import Factors
from networks.module_factors import get_lora_rank, group_by_module, to_meta_tensor
from networks.module_names import read_family
from networks.names.layouts import EXPERT_VALUES, FOR_BOTH, LAYOUT_KEY, OURS, TRAINED_EXPERT
from protocols.loading import TensorInfo
from protocols.rules import parse_expert

if TYPE_CHECKING:  # of a file that is described alone
    from networks.key_formats import NativeTensors

# metadata of each expert's LoRA in a file for several experts: {"high_noise": {...}, ...} as JSON
PARTS_METADATA = "reelsmith_experts"


def find_lora_expert(metadata: Mapping[str, str], path: Path) -> str | None:
    """Return the expert (high or low noise) that a LoRA was trained for, or FOR_BOTH; None if unknown.

    Metadata takes precedence over the file name: `x_high_noise.safetensors`, `x-HIGH-v2.safetensors`.
    """
    value = metadata.get(TRAINED_EXPERT, "").strip().lower()
    if value == FOR_BOTH:
        return FOR_BOTH
    return EXPERT_VALUES.get(value) or parse_expert(path.stem)


def in_words(expert: str) -> str:
    """Return an expert's name in words, such as "high-noise expert"."""
    return f"{expert.replace('_', '-')} expert"


def select_expert_metadata(metadata: Mapping[str, str], expert: str) -> dict[str, str]:
    """Return the metadata of one expert's LoRA in a file for several experts, including the expert's name.

    Raises:
        ValueError: If the file's metadata for its experts cannot be parsed.
    """
    common = {key: value for key, value in metadata.items() if key != PARTS_METADATA}
    expert_entries = parse_json(metadata.get(PARTS_METADATA, "{}")).get(expert, {})
    expert_value = next(value for value, name in EXPERT_VALUES.items() if name == expert)
    part_metadata = {str(key): str(text) for key, text in expert_entries.items()}
    return {**common, **part_metadata, TRAINED_EXPERT: expert_value}


LEGACY_START = 0x100000  # bytes before the hashed ones, 1 MiB
LEGACY_BYTES = 0x10000  # hashed bytes, 64 KiB
# prefixes of the metadata keys of hashes, which are wrong once the tensors are changed
STALE = ("sshs_", "modelspec.hash_sha256", LAYOUT_KEY)


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash` of these tensors.

    Both are SHA-256 hashes of a safetensors file whose metadata contains only the `ss_*` keys. The first
    covers the bytes of the tensors. The second covers 64 KiB at offset 1 MiB, cut to 8 hexadecimal digits.
    """
    training_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = memoryview(safetensors.torch.save(on_cpu, training_metadata))
    header_bytes = int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[8 + header_bytes :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[LEGACY_START : LEGACY_START + LEGACY_BYTES]).hexdigest()[:8],
    }


def add_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata with new hashes of the tensors, which `is_damaged` compares with the file."""
    return {**metadata, **model_hashes(tensors, metadata), LAYOUT_KEY: layout_hash(tensors)}


def layout_hash(tensors: Mapping[str, Tensor | TensorInfo]) -> str:
    """Return a hash (16 hex digits) of tensor names, dtypes and shapes, which identifies our files."""
    lines = sorted(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:16]


def is_damaged(path: Path, metadata: Mapping[str, str]) -> bool:
    """Return whether the data of a safetensors file written by us differs from its checksum.

    Tools that rename or cast tensors may copy old hashes, so call this only if the layout is unchanged.
    """
    if "sshs_model_hash" not in metadata:
        return False
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest() != metadata["sshs_model_hash"]


def save_network(
    module: nn.Module,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    additional_tensors: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a network to a file, completely or not at all, with hashes added to the metadata.

    Args:
        module: The network.
        path: Path of the file.
        dtype: Dtype of the tensors in the file; None keeps the training dtype.
        metadata: Metadata of the file, without hashes.
        additional_tensors: Additional tensors, by their names in the file.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in {**module.state_dict(), **additional_tensors}.items()
    }
    save_tensors(path, tensors, add_hashes(tensors, metadata))


MAX_LISTED = 8  # kinds of layers, or ranks, in a description
MAX_HASHED = 4 << 30  # bytes of tensors that are hashed in memory


def describe_lora(checkpoint: Checkpoint) -> str | None:
    """Describe the LoRA in an open file: kind, model, ranks, layers; None if it is not a LoRA.

    The only tensor values that are read are alphas.
    """
    from networks import key_formats  # only for LoRAs

    unsupported = key_formats.other_kind(checkpoint.tensors)
    if unsupported is not None:
        kind, _ = unsupported
        return f"a network of the kind {kind}, which is not supported"
    descriptions = []
    for expert, names in key_formats.split_names(checkpoint.tensors).items():
        description = _describe_lora(checkpoint, names, expert)
        if description is None:
            return None
        # no expert: the file has a single network
        descriptions.append(description if expert is None else f"{description}, for the {in_words(expert)}")
    return "; ".join(descriptions) or None


def lora_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hashes by which model browsers find a LoRA; {} if it is too large or not a LoRA."""
    size = sum(info.size_bytes for info in checkpoint.tensors.values())
    if size > MAX_HASHED or describe_lora(checkpoint) is None:
        return {}
    return model_hashes({name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.metadata)


def _describe_lora(checkpoint: Checkpoint, names: list[str], expert: str | None) -> str | None:
    """Describe one expert's LoRA, or the only LoRA of a file; None if the tensors are not a LoRA."""
    from networks import key_formats  # only for LoRAs
    from networks.tensor_names import dialect_in_words

    trained_family = read_family(checkpoint.metadata)
    hint = None if trained_family is None else trained_family.name
    # names and shapes are enough here, so no values are read
    hollow_tensors = {name: to_meta_tensor(checkpoint.tensors[name]) for name in names}
    native = key_formats.to_native(hollow_tensors, hint)
    in_dit = group_by_module(native.tensors)
    in_texts = group_by_module(native.text_tensors)
    modules = in_dit | in_texts
    # in a full model, some names may look like LoRA keys
    if not modules or 2 * len(native.unknown_keys) > len(names):
        return None
    families = [family.name for family in key_formats.find_lora_families(in_dit, hint)]
    # if no family has these names, trust the metadata
    models = " or ".join(families) or hint
    for_models = f" for {models}" if models else ""
    alphas = _read_stored_alphas(checkpoint, names) | _read_other_alphas(checkpoint, native, expert)
    clauses = [
        f"{_describe_kinds(modules)}{for_models}, {dialect_in_words(native.dialect)}",
        *_describe_scales(modules, alphas),
        f"{format_count(len(modules), 'layer')}: {_describe_layers(modules)}",
    ]
    if in_texts:
        clauses.append(f"{len(in_texts)} of them in text encoders")
    trained_expert = find_lora_expert(checkpoint.metadata, checkpoint.path)
    if trained_expert is not None and trained_expert != FOR_BOTH:
        clauses.append(f"trained for the {in_words(trained_expert)}")
    return ", ".join(clauses)


def _describe_scales(modules: Mapping[str, Factors], alphas: Iterable[float]) -> list[str]:
    """Describe a network's ranks, block sizes and alphas in one clause each, leaving out what it lacks."""
    ranks = Counter(rank for rank in map(get_lora_rank, modules.values()) if rank is not None)
    clauses = [describe_numbers("rank", ranks)]
    for word, sizes in sizes_by_word(modules.values()).items():
        clauses.append(describe_numbers(word, Counter(sizes)))
    # infinite alphas belong to whole matrices, which are not scaled
    finite_alphas = Counter(filter(math.isfinite, alphas))
    clauses.append(describe_numbers("alpha", finite_alphas))
    return [clause for clause in clauses if clause]


def _describe_kinds(modules: Mapping[str, Factors]) -> str:
    """Return the network kinds that the modules' factors show, for messages: `a LoHa and LoRA`."""
    parts = {part for factors in modules.values() for part in factors}
    if MAGNITUDES in parts:
        return f"a {MAGNITUDE_KIND_NAME}"
    kinds = {kind.name: kind for mark, kind in KIND_BY_FACTOR.items() if mark in parts}
    if not kinds:
        return "a whole differences of weights"
    names = sorted(kinds)
    return " and ".join([named(kinds[names[0]]), *names[1:]])


def _describe_layers(modules: Iterable[str]) -> str:
    """List modules with their numbers of blocks: `blocks_N_self_attn_q (40), blocks_N_ffn_0 (40)`."""
    counts = Counter(re.sub(r"\d+", "N", name.removeprefix(OURS), count=1) for name in modules)
    layers = [f"{name} ({count})" for name, count in counts.most_common(MAX_LISTED)]
    description = ", ".join(layers)
    num_unlisted = len(counts) - MAX_LISTED
    if num_unlisted > 0:
        description += f" and {num_unlisted} kinds more"
    return description


def _read_stored_alphas(checkpoint: Checkpoint, names: Iterable[str]) -> set[float]:
    """Return the distinct scalar alphas stored as tensors in a file."""
    alphas: set[float] = set()
    for name in names:
        info = checkpoint.tensors[name]
        if name.endswith(".alpha") and info.size_bytes == info.dtype.itemsize:
            alphas.add(float(checkpoint.read(name)))
    return alphas


def _read_other_alphas(checkpoint: Checkpoint, native: "NativeTensors", expert: str | None) -> set[float]:
    """Return alphas that are not tensors, from metadata or PEFT's settings."""
    # An empty set if they are invalid.
    from networks.alphas import read_alphas, read_folded  # only for LoRAs

    # the hash in the metadata shows that the file still has the layout that we wrote
    is_written_here = checkpoint.metadata.get(LAYOUT_KEY) == layout_hash(checkpoint.tensors)
    # rank -> alpha / rank, which is multiplied into the factors of our files without alphas
    folded = read_folded(checkpoint.metadata) if is_written_here else {}
    if folded:
        return {rank * strength for rank, strength in folded.items()}
    try:
        alphas = read_alphas(
            checkpoint.path,
            checkpoint.metadata,
            native=native,
            expert=expert,
            is_written_here=is_written_here,
            warns=False,
        )
    except CheckpointError:
        return set()
    return set(map(float, alphas.tensors.values()))


def describe_numbers(word: str, numbers: Collection[float]) -> str:
    """Return "rank 4, 8" for the word "rank", or "rank 4 to 64" for many numbers; "" without numbers."""
    if not numbers:
        return ""
    if len(numbers) > MAX_LISTED:
        return f"{word} {min(numbers):g} to {max(numbers):g}"
    return f"{word} {', '.join(f'{number:g}' for number in sorted(numbers))}"
