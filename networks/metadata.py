"""What LoRA files say of themselves: their expert, checksums that model browsers look up, PEFT's settings; a
description in a line.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from modules.checkpoints.opening import Checkpoint
from modules.checkpoints.writing import save_tensors
from modules.contract.rules import named_expert
from modules.limits import MAX_EXPRESSIONS, MAX_SEARCH_SECONDS
from modules.text_files import parse_json, read_text
from networks.deltas import DORA, Factors, group_by_module, rank_of
from networks.key_formats import OURS, dialect_in_words, families_of, other_kind, to_native
from networks.module_names import FAMILIES, read_family
from networks.names.layouts import EXPERT_VALUES, FOR_BOTH, IN_DIFFUSERS, TRAINED_EXPERT, UNET_IN_DIFFUSERS
from networks.names.stable_diffusion import diffusers_path_of_text

# what a LoRA file with a part for each expert says of single parts: {"high_noise": {...}, ...} as JSON
PARTS_METADATA = "reelsmith_experts"
# where pipelines of diffusers keep the experts' networks, also what names of tensors then begin with
NETWORKS = {f"{network}.": expert for family in FAMILIES for network, expert in family.experts}
_FURTHER = tuple(start for start in NETWORKS if start != IN_DIFFUSERS)


def expert_of(metadata: Mapping[str, str], path: Path) -> str | None:
    """Return the expert that a LoRA was trained for, or FOR_BOTH; None if unknown.

    Metadata count before the file's name: `x_high_noise.safetensors`, `x-HIGH-v2.safetensors`.
    """
    value = metadata.get(TRAINED_EXPERT, "").strip().lower()
    if value == FOR_BOTH:
        return FOR_BOTH
    return EXPERT_VALUES.get(value) or named_expert(path.stem)


def in_words(expert: str) -> str:
    """`high_noise` -> `high-noise expert`."""
    return f"{expert.replace('_', '-')} expert"


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensors of a LoRA file by expert; {None: all} if the file has no parts for experts.

    A file has them if names begin with those of further networks in a pipeline of diffusers.
    """
    names = list(names)
    found: dict[str | None, list[str]] = {}
    if not any(name.startswith(_FURTHER) for name in names):
        return {None: names}
    for name in names:
        start = next((start for start in NETWORKS if name.startswith(start)), IN_DIFFUSERS)
        found.setdefault(NETWORKS[start], []).append(name)
    return found


def metadata_of(metadata: Mapping[str, str], expert: str) -> dict[str, str]:
    """Return the metadata of one part of a file with a part for each expert, which name the expert.

    Raises ValueError if the file's metadata of its parts are unreadable.
    """
    common = {key: value for key, value in metadata.items() if key != PARTS_METADATA}
    own = parse_json(metadata.get(PARTS_METADATA, "{}")).get(expert, {})
    value = next(value for value, name in EXPERT_VALUES.items() if name == expert)
    return {**common, **{str(key): str(text) for key, text in own.items()}, TRAINED_EXPERT: value}


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


# what the magnitudes of a DoRA by output are divided by: with this value the norms of the frozen weights, as
# ComfyUI does it, otherwise those of the changed ones. A public name: other tools write it too.
DORA_FORM, FROZEN_NORMS = "ss_dora_scale_format", "comfy_weight_norm"
_MUSUBI_MODULE = re.compile(r"(musubi_tuner\.)?networks\.lo(ra|kr)")


def is_of_frozen_norms(tensors: Mapping[str, Tensor], dialect: str, metadata: Mapping[str, str]) -> bool:
    """Tell whether a file is a DoRA for ComfyUI by musubi-tuner's fork for LTX-2, which does not mark them.

    It calls magnitudes so in these files alone. Ours have the same names, but a hash of the layout too.
    """
    return (
        dialect == "other"
        and any(name.endswith(DORA) for name in tensors)
        and _MUSUBI_MODULE.match(metadata.get("ss_network_module", "")) is not None
        and LAYOUT_KEY not in metadata
    )


# where diffusers keeps the adapter's settings among a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
_PLAIN_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def peft_config(path: Path, metadata: Mapping[str, str], start: str) -> dict[str, Any]:
    """The adapter's settings that diffusers keeps in the metadata and PEFT in a file beside the weights; {}
    without them.

    start: of the names of the network that they are for, in the metadata.
    """
    folder = path if path.is_dir() else path.parent
    config_path = folder / "adapter_config.json"
    if PEFT_SETTINGS in metadata:
        entries = parse_json(metadata[PEFT_SETTINGS])
        others = tuple(one for one in NETWORKS if one != start)
        return {
            key.removeprefix(start).removeprefix(UNET_IN_DIFFUSERS): value
            for key, value in entries.items()
            if not key.startswith(others)
        }
    if (path.is_dir() or path.name.startswith("adapter_model")) and config_path.is_file():
        return dict(parse_json(read_text(config_path)))
    return {}


def text_alphas(texts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Alphas of LoRAs for text encoders that stand in diffusers' metadata, as `peft_alphas`."""
    alphas: dict[str, Tensor] = {}
    if PEFT_SETTINGS not in metadata:
        return alphas
    modules = group_by_module(texts)
    paths = {name: found for name in modules if (found := diffusers_path_of_text(name)) is not None}
    entries = parse_json(metadata[PEFT_SETTINGS])
    for start in {each.partition(".")[0] + "." for each in paths.values()}:
        config = {key.removeprefix(start): value for key, value in entries.items() if key.startswith(start)}
        own = {name: found.removeprefix(start) for name, found in paths.items() if found.startswith(start)}
        alphas |= peft_alphas({name: modules[name] for name in own}, own, config)
    return alphas


def peft_alphas(
    modules: Mapping[str, Factors], paths: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Alphas that stand in PEFT's settings rather than beside the factors.

    modules: factors by name. paths: of these modules, as the file writes them. Raises ValueError if the
    settings cannot be used.
    """
    if not config:
        return {}
    # a key is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for it; of several
    # that match, PEFT takes the first
    values = {key: _finite(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    places = {key: place for place, key in enumerate(values)}
    expressions = [key for key in values if not _PLAIN_KEY.fullmatch(key)]
    if sum(map(len, expressions)) > MAX_EXPRESSIONS:
        raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
    fitting = {key: _expression(key) for key in expressions}
    default = None if config.get("lora_alpha") is None else _finite(config["lora_alpha"])
    alphas = {}
    for module, factors in modules.items():
        rank = rank_of(factors)
        if rank is None or "alpha" in factors:
            continue
        path = paths[module]  # `blocks.0.attn1.to_q`
        ends = [path, *(path[index + 1 :] for index, char in enumerate(path) if char == ".")]
        found = [end for end in ends if end in places]
        found += [key for key, fits in fitting.items() if fits(path)]
        alpha = values[min(found, key=places.__getitem__)] if found else default
        if alpha is None:
            continue
        if config.get("use_rslora"):
            alpha = alpha * rank**0.5  # PEFT scales by alpha / sqrt(rank) then
        alphas[f"{module}.alpha"] = torch.tensor(alpha)
    return alphas


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _expression(key: str) -> Callable[[str], bool]:
    """Return the function that tells whether a key of PEFT's `alpha_pattern` matches a module's path.

    Raises ValueError if the key is no regular expression; so does the function if the search takes too long.
    """
    import regex  # seldom needed

    try:
        pattern = regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is no regular expression: {error}") from None

    def fits(path: str) -> bool:
        try:
            return pattern.match(path, timeout=MAX_SEARCH_SECONDS) is not None
        except TimeoutError:
            raise ValueError(f"the key {key!r} takes too long to search {path} for") from None

    return fits


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
    hint = None if made is None else made.name
    native = to_native(hollow, hint)
    modules = group_by_module({**native.tensors, **native.texts})
    in_texts = len(group_by_module(native.texts))
    kinds = {name for factors in modules.values() for part, name in KINDS.items() if part in factors}
    if not modules or 2 * len(native.unknown) > len(names):  # a whole model may have a LoRA's names in it
        return None
    families = families_of(group_by_module(native.tensors), hint)
    families = families or ([] if made is None else [made])
    what = "DoRA" if "DoRA" in kinds else " and ".join(sorted(kinds)) or "whole differences of weights"
    model = f" for {' or '.join(one.name for one in families)}" if families else ""
    ranks = Counter(rank for factors in modules.values() if (rank := rank_of(factors)) is not None)
    alphas = set()
    for name in names:
        info = checkpoint.tensors[name]
        if name.endswith(".alpha") and info.size_bytes == info.dtype.itemsize:
            alphas.add(float(checkpoint.read(name)))
    expert = expert_of(checkpoint.metadata, checkpoint.path)
    # `blocks_N_self_attn_q (40), blocks_N_ffn_0 (40)`
    counts = Counter(re.sub(r"\d+", "N", name.removeprefix(OURS), count=1) for name in modules)
    layers = [f"{name} ({number})" for name, number in counts.most_common(LISTED)]
    more = f" and {len(counts) - LISTED} kinds more" if len(counts) > LISTED else ""
    words = [
        f"a {what}{model}, {dialect_in_words(native.dialect)}",
        _of_numbers("rank", ranks),
        _of_numbers("alpha", Counter(alphas)),
        f"{len(modules)} layers: {', '.join(layers)}{more}",
        f"{in_texts} of them in text encoders" if in_texts else "",
        "" if expert in (None, FOR_BOTH) else f"trained for the {in_words(str(expert))}",
    ]
    return ", ".join(word for word in words if word)


def _of_numbers(word: str, numbers: "Counter[int] | Counter[float]") -> str:
    if not numbers:
        return ""
    if len(numbers) > LISTED:
        return f"{word} {min(numbers):g} to {max(numbers):g}"
    return f"{word} {', '.join(f'{number:g}' for number in sorted(numbers))}"
