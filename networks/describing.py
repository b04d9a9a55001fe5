"""Describe a LoRA file in a line, with its checksums, for tools that look into files."""

import re
from collections import Counter
from collections.abc import Mapping

import torch

from modules.checkpoints.opening import Checkpoint
from networks.deltas import DORA, Factors, group_by_module, rank_of
from networks.key_formats import OURS, dialect_in_words, other_kind, to_native
from networks.loading import family_of
from networks.metadata import expert_of, in_words, model_hashes, split_names
from networks.module_names import read_family
from networks.names.layouts import FOR_BOTH

KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    DORA: "DoRA",
    "lora_down.weight": "LoRA",
}
LISTED = 8  # kinds of layers, ranks
LARGEST = 4 << 30  # bytes of tensors that are hashed in memory


def describe_lora(checkpoint: Checkpoint) -> str | None:
    """Describe the LoRA in an open file: kind, model, ranks, layers; None if it is no LoRA.

    Only scales are read.
    """
    unsupported = other_kind(checkpoint.tensors)
    if unsupported is not None:
        return f"a network of the kind {unsupported[0]}, which is not supported"
    parts = []
    for expert, names in split_names(checkpoint.tensors).items():
        one = _describe_part(checkpoint, names)
        if one is None:
            return None
        parts.append(one if expert is None else f"{one}, for the {in_words(expert)}")
    return "; ".join(parts) or None


def lora_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checksums that model browsers look a LoRA up by, as training writes them into its metadata.

    Empty if the file is no LoRA, or too large to be one.
    """
    size = sum(info.size_bytes for info in checkpoint.tensors.values())
    if size > LARGEST or describe_lora(checkpoint) is None:
        return {}
    return model_hashes({name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint.metadata)


def _describe_part(checkpoint: Checkpoint, names: list[str]) -> str | None:
    hollow = {
        name: torch.empty(checkpoint.tensors[name].shape, dtype=checkpoint.tensors[name].dtype, device="meta")
        for name in names
    }
    made = read_family(checkpoint.metadata)
    native = to_native(hollow, None if made is None else made.name)
    modules = group_by_module({**native.tensors, **native.texts})
    in_texts = len(group_by_module(native.texts))
    kinds = {name for factors in modules.values() for part, name in KINDS.items() if part in factors}
    if not modules or 2 * len(native.unknown) > len(names):  # a whole model may have a LoRA's names in it
        return None
    family = made or family_of(group_by_module(native.tensors))
    what = "DoRA" if "DoRA" in kinds else " and ".join(sorted(kinds)) or "whole differences of weights"
    model = f" for {family.name}" if family is not None else ""
    ranks = Counter(rank for factors in modules.values() if (rank := rank_of(factors)) is not None)
    alphas = {float(checkpoint.read(name)) for name in names if _is_alpha(checkpoint, name)}
    expert = expert_of(checkpoint.metadata, checkpoint.path)
    words = [
        f"a {what}{model}, {dialect_in_words(native.dialect)}",
        _of_numbers("rank", ranks),
        _of_numbers("alpha", Counter(alphas)),
        f"{len(modules)} layers: {_layers(modules)}",
        f"{in_texts} of them in text encoders" if in_texts else "",
        "" if expert in (None, FOR_BOTH) else f"trained for the {in_words(str(expert))}",
    ]
    return ", ".join(word for word in words if word)


def _is_alpha(checkpoint: Checkpoint, name: str) -> bool:
    info = checkpoint.tensors[name]
    return name.endswith(".alpha") and info.size_bytes == info.dtype.itemsize


def _of_numbers(word: str, numbers: "Counter[int] | Counter[float]") -> str:
    if not numbers:
        return ""
    if len(numbers) > LISTED:
        return f"{word} {min(numbers):g} to {max(numbers):g}"
    return f"{word} {', '.join(f'{number:g}' for number in sorted(numbers))}"


def _layers(modules: Mapping[str, Factors]) -> str:
    """`blocks_N_self_attn_q (40), blocks_N_ffn_0 (40)`."""
    counts = Counter(re.sub(r"\d+", "N", name.removeprefix(OURS), count=1) for name in modules)
    shown = [f"{name} ({number})" for name, number in counts.most_common(LISTED)]
    more = f" and {len(counts) - LISTED} kinds more" if len(counts) > LISTED else ""
    return ", ".join(shown) + more
