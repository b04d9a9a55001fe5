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
from modules.console import count_of
from modules.errors import CheckpointError
from modules.text_files import parse_json
from networks.deltas import group_by_module, hollow, rank_of
from networks.kinds.composing import MAGNITUDES, MARKS, OF_MAGNITUDES, sizes_by_word
from networks.kinds.factors import Factors
from networks.module_names import read_family
from networks.names.layouts import EXPERT_VALUES, FOR_BOTH, OURS, TRAINED_EXPERT
from protocols.loading import TensorInfo
from protocols.rules import named_expert

if TYPE_CHECKING:  # of a file that is described alone
    from networks.key_formats import NativeTensors

# metadata of the single parts in a LoRA file with a part for each expert: {"high_noise": {...}, ...} as JSON
PARTS_METADATA = "reelsmith_experts"


def expert_of(metadata: Mapping[str, str], path: Path) -> str | None:
    """Return the expert that a LoRA was trained for, or FOR_BOTH; None if unknown.

    Metadata take precedence over the file's name: `x_high_noise.safetensors`, `x-HIGH-v2.safetensors`.
    """
    value = metadata.get(TRAINED_EXPERT, "").strip().lower()
    if value == FOR_BOTH:
        return FOR_BOTH
    return EXPERT_VALUES.get(value) or named_expert(path.stem)


def in_words(expert: str) -> str:
    """Return an expert's name as words, such as "high-noise expert"."""
    return f"{expert.replace('_', '-')} expert"


def metadata_of(metadata: Mapping[str, str], expert: str) -> dict[str, str]:
    """Return the metadata for one expert's part of a file; they name the expert.

    Raises:
        ValueError: If the file's metadata of its parts are unreadable.
    """
    common = {key: value for key, value in metadata.items() if key != PARTS_METADATA}
    of_expert = parse_json(metadata.get(PARTS_METADATA, "{}")).get(expert, {})
    value = next(value for value, name in EXPERT_VALUES.items() if name == expert)
    texts = {str(key): str(text) for key, text in of_expert.items()}
    return {**common, **texts, TRAINED_EXPERT: value}


LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000
LAYOUT_KEY = "reelsmith_layout"
STALE = ("sshs_", "modelspec.hash_sha256", LAYOUT_KEY)  # metadata of other tensors: how hashes in them begin


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `sshs_model_hash` and `sshs_legacy_hash` of these tensors.

    The first is SHA-256 over the data part of a safetensors file. The second is the first 8 digits of SHA-256
    over 64 KiB at 1 MiB of a file that has only the `ss_*` metadata. Other metadata change neither.
    """
    training_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = memoryview(safetensors.torch.save(ready, training_metadata))
    header_bytes = int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[8 + header_bytes :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[LEGACY_START : LEGACY_START + LEGACY_BYTES]).hexdigest()[:8],
    }


def add_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the hashes of these tensors, replacing older ones; `is_damaged` reads them."""
    return {**metadata, **model_hashes(tensors, metadata), LAYOUT_KEY: layout_hash(tensors)}


def layout_hash(tensors: Mapping[str, Tensor | TensorInfo]) -> str:
    """Return 16 hexadecimal digits of a hash of names, dtypes and shapes, to recognize our own files."""
    lines = sorted(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:16]


def is_damaged(path: Path, metadata: Mapping[str, str]) -> bool:
    """Return whether the data of a safetensors file written by us differ from its checksum.

    Tools that rename or cast tensors may copy old hashes: call only if the layout is as we wrote it.
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
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a network to a file, completely or not at all, with hashes added to the metadata.

    Args:
        module: The module.
        path: Path of the file.
        dtype: Dtype of the tensors in the file; None keeps that of training.
        metadata: Metadata of the file.
        beside: Additional tensors, by their names in the file.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in {**module.state_dict(), **beside}.items()
    }
    save_tensors(path, tensors, add_hashes(tensors, metadata))


LISTED = 8  # kinds of layers, ranks
LARGEST = 4 << 30  # largest size of tensors, in bytes, to hash in memory


def describe_lora(checkpoint: Checkpoint) -> str | None:
    """Describe the LoRA in an open file: kind, model, ranks, layers; None if it is not a LoRA.

    Only scales are read.
    """
    from networks import key_formats  # only for LoRAs

    unsupported = key_formats.other_kind(checkpoint.tensors)
    if unsupported is not None:
        return f"a network of the kind {unsupported[0]}, which is not supported"
    parts = []
    for expert, names in key_formats.split_names(checkpoint.tensors).items():
        description = _describe_part(checkpoint, names, expert)
        if description is None:
            return None
        parts.append(description if expert is None else f"{description}, for the {in_words(expert)}")
    return "; ".join(parts) or None


def lora_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checksums that browsers find a LoRA by; {} if the file is not a LoRA or too large."""
    size = sum(info.size_bytes for info in checkpoint.tensors.values())
    if size > LARGEST or describe_lora(checkpoint) is None:
        return {}
    return model_hashes({name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.metadata)


def _describe_part(checkpoint: Checkpoint, names: list[str], part: str | None) -> str | None:
    """Describe the LoRA of one expert, or of a model without experts; None if it is not a LoRA.

    Args:
        checkpoint: The opened checkpoint.
        names: Names of its tensors.
        part: Expert, if the file has a LoRA for each; else None.
    """
    from networks import key_formats  # only for LoRAs
    from networks.tensor_names import dialect_in_words

    trained_family = read_family(checkpoint.metadata)
    hint = None if trained_family is None else trained_family.name
    hollow_tensors = {name: hollow(checkpoint.tensors[name]) for name in names}
    native = key_formats.to_native(hollow_tensors, hint)
    in_dit = group_by_module(native.tensors)
    in_texts = group_by_module(native.texts)
    modules = in_dit | in_texts
    if not modules or 2 * len(native.unknown) > len(names):  # a whole model may have a LoRA's names in it
        return None
    families = [family.name for family in key_formats.families_of(in_dit, hint)]
    if not families and hint is not None:
        families = [hint]
    model = f" for {' or '.join(families)}" if families else ""
    dialect = dialect_in_words(native.dialect)
    alphas = _stored_alphas(checkpoint, names) | _alphas_of_settings(checkpoint, native, part)
    kinds = _kinds_in_words(modules)
    words = [
        f"{kinds}{model}, {dialect}",
        *_describe_scales(modules, alphas),
        f"{count_of(len(modules), 'layer')}: {_layers_in_words(modules)}",
    ]
    if in_texts:
        words.append(f"{len(in_texts)} of them in text encoders")
    expert = expert_of(checkpoint.metadata, checkpoint.path)
    if expert is not None and expert != FOR_BOTH:
        words.append(f"trained for the {in_words(expert)}")
    return ", ".join(words)


def _describe_scales(modules: Mapping[str, Factors], alphas: Iterable[float]) -> list[str]:
    """Describe the ranks, block sizes and alphas of a network in words; sizes that it lacks are left out."""
    ranks = Counter(rank for rank in map(rank_of, modules.values()) if rank is not None)
    # infinite alphas belong to whole matrices, which are not scaled
    finite = Counter(filter(math.isfinite, alphas))
    sizes = [of_numbers(word, Counter(numbers)) for word, numbers in sizes_by_word(modules.values()).items()]
    in_words = (of_numbers("rank", ranks), *sizes, of_numbers("alpha", finite))
    return [words for words in in_words if words]


def _kinds_in_words(modules: Mapping[str, Factors]) -> str:
    """Return the kinds of a network by the factors of its modules: `a LoHa and LoRA`."""
    parts = {part for factors in modules.values() for part in factors}
    if MAGNITUDES in parts:
        return f"a {OF_MAGNITUDES}"
    kinds = {kind.name: kind for mark, kind in MARKS.items() if mark in parts}
    if not kinds:
        return "a whole differences of weights"
    return f"{kinds[min(kinds)].article} {' and '.join(sorted(kinds))}"


def _layers_in_words(modules: Iterable[str]) -> str:
    """Count the layers of each kind, in words: `blocks_N_self_attn_q (40), blocks_N_ffn_0 (40)`."""
    counts = Counter(re.sub(r"\d+", "N", name.removeprefix(OURS), count=1) for name in modules)
    layers = [f"{name} ({number})" for name, number in counts.most_common(LISTED)]
    num_unlisted = len(counts) - LISTED
    ending = f" and {num_unlisted} kinds more" if num_unlisted > 0 else ""
    return ", ".join(layers) + ending


def _stored_alphas(checkpoint: Checkpoint, names: Iterable[str]) -> set[float]:
    """Return the alphas among a file's tensors."""
    alphas: set[float] = set()
    for name in names:
        info = checkpoint.tensors[name]
        if name.endswith(".alpha") and info.size_bytes == info.dtype.itemsize:
            alphas.add(float(checkpoint.read(name)))
    return alphas


def _alphas_of_settings(checkpoint: Checkpoint, native: "NativeTensors", part: str | None) -> set[float]:
    """Return the alphas in the header or in a file of settings; empty if they are unusable."""
    from networks.alphas import read_alphas, read_folded  # only for LoRAs

    is_own = checkpoint.metadata.get(LAYOUT_KEY) == layout_hash(checkpoint.tensors)
    folded = read_folded(checkpoint.metadata) if is_own else {}
    if folded:
        return {rank * strength for rank, strength in folded.items()}
    try:
        alphas = read_alphas(
            checkpoint.path,
            checkpoint.metadata,
            native=native,
            expert=part,
            is_written_here=is_own,
            warns=False,
        )
    except CheckpointError:
        return set()
    return set(map(float, alphas.tensors.values()))


def of_numbers(word: str, numbers: Collection[float]) -> str:
    """Return a word with its numbers, or with their range if they are many; "" if there are none."""
    if not numbers:
        return ""
    if len(numbers) > LISTED:
        return f"{word} {min(numbers):g} to {max(numbers):g}"
    return f"{word} {', '.join(f'{number:g}' for number in sorted(numbers))}"
