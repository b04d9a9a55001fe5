"""The names of tensors in LoRA files: the prefixes and endings that programs add to a module's path.

ours        lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight   .alpha
other       diffusion_model.blocks.0.self_attn.q.lora_A.weight   .lora_B.weight   (ComfyUI; alpha is optional)
diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, base_model.model. ... (PEFT; .lora.down / .lora.up)
LyCORIS     lycoris_blocks_0_self_attn_q.hada_w1_a ...
LTX-2       lora_unet_model_transformer_blocks_0_attn1_to_q.lora_down.weight (musubi-tuner's fork)
VideoX-Fun  lora_unet__blocks_0_self_attn_q.lora_down.weight
DiffSynth   pipe.dit.blocks.0.self_attn.q.lora_A.default.weight
            blocks.0.attn.qkv_proj.lora_B.default.weight (MiniMax-H3, with the rows by head)
ComfyUI     also diffusion_model.blocks.0.norm3.set_weight, which replaces the model's weight
LightX2V    as other, with diffusion_model.blocks.0.norm3.diff   .diff_b   diffusion_model.blocks.0.diff_m
U-Nets      unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, also with
            attn1.processor.to_q_lora.down.weight (diffusers before PEFT); input_blocks_1_1_... in place of
            down_blocks_0_attentions_0_... (LDM, sd-scripts for SDXL)

`split_key` and `split_text` parse such names; `writing.py` writes them with the same prefixes and endings.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from networks.formats import kohya
from networks.formats.diffusers import ENDINGS, SPELLINGS
from networks.kinds.composing import MAGNITUDES
from networks.module_factors import FACTOR_NAMES
from networks.module_names import FAMILIES, is_known_module
from networks.names.layouts import (
    CLIP_LAYER_PREFIX,
    IN_COMFYUI,
    IN_DIFFUSERS,
    LANGUAGE_MODEL_LAYER_PREFIX,
    LTX_FORK_PREFIX,
    OURS,
    T5_LAYER_PREFIX,
    UNET_IN_DIFFUSERS,
    FamilyNames,
)
from networks.names.texts import TEXT_PROJECTION

IN_OUR_NAMES = "ours"  # dialect of the names that established trainers write
# prefixes that reveal a dialect only as a whole; they are removed in several steps, like other prefixes
_SPECIAL = {LTX_FORK_PREFIX: "musubi-tuner for LTX-2", "lora_unet__": "VideoX-Fun"}
# parts of a path added by wrappers of modules: torch.compile, checkpointing, FSDP
_WRAPPERS = re.compile(
    r"(?:(?<=[._])|^)_(?:orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)(?:[._]|$)"
)
_IN_WORDS = {
    "": "sd-scripts",
    IN_OUR_NAMES: "sd-scripts",
    "other": "ComfyUI",
    "without prefix": "files without a prefix",
}
# prefixes of text encoders' names, with the number or name of the encoder
_TEXT = re.compile(
    r"(?:lora_|lycoris_)te(?P<ours>[1-4]?)[_.]|lora_(?:clip|t5)[_-]|te(?P<short>[1-4])[_.]|text_encoder(?:_(?P<pipeline>[2-4]))?[_.]"
    r"|text_encoders\.(?P<comfy>\w+)\.|(?P<alone>clip_[lg]|t5(?:xxl)?)\.|cond_stage_model\.|conditioner\.embedders\.(?P<ldm>\d)\."
)
# prefixes between a text encoder's prefix and the path of its layer
_TEXT_LAYER_PREFIXES = tuple(
    spelling
    for prefix in ("transformer.", "language_model.", "model.", "base_model.model.", "module.", "qwen3.")
    for spelling in (prefix, prefix.replace(".", "_"))
)
# prefixes of names in CLIP without `text_model.`, as in transformers 5
_CLIP_WITHOUT_TEXT_MODEL = ("encoder_layers_", "embeddings_", "final_layer_norm")
# prefixes of layer names that reveal a text encoder in files that do not name the encoder
_UNPREFIXED_TEXT_LAYERS = ("text_model.encoder.", "encoder.block.")
# text encoders to assume if the family is unknown
_FALLBACK_ENCODERS = (
    *FamilyNames.encoders,
    ("lora_te2", CLIP_LAYER_PREFIX),
    ("lora_te", LANGUAGE_MODEL_LAYER_PREFIX),
)
# names of the LoRA factors in other programs -> ours
FACTORS = {"A": "lora_down", "B": "lora_up", "a": "lora_down", "b": "lora_up"}
FACTORS |= {"down": "lora_down", "up": "lora_up"}
# our parts -> their endings in PEFT, diffusers and ComfyUI
PEFT_ENDS = {f"{FACTORS[x]}.{leaf}": f"lora_{x}.{leaf}" for x in "AB" for leaf in ("weight", "bias")}
# ending of DoRA magnitudes, only in diffusers
MAGNITUDES_END = next((end.removeprefix(".") for end, part in ENDINGS.items() if part == MAGNITUDES), "")
# ending in any program -> our part
_ENDINGS = {
    **ENDINGS,
    ".w_norm": "diff",  # LyCORIS, of norms
    ".b_norm": "diff_b",
    **dict.fromkeys((".lora_alpha", ".network_alpha", ".lora.alpha"), "alpha"),
    **{f".{part}": part for part in FACTOR_NAMES},
}
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)
# `.lora_A.weight`, `.lora.down.weight`, `.lora_linear_layer.up.weight`; `.lora_A`, a bare parameter; PEFT's
# `.lora_A.default.weight`, with any adapter name instead of `default` (files saved by PEFT itself lack it)
_FACTOR = re.compile(
    r"\.lora(?:_linear_layer)?[._]?(?:lora_)?(?P<factor>[ABab]|down|up)(?:(?:\.[^.]+)*?(?P<leaf>\.weight|\.bias))?$"
)
# diffusers before PEFT: factors belong to the attention module, not to its layers
_PROCESSOR = re.compile(r"(\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<factor>down|up)\.weight$")
_PROCESSOR_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_MODULATION = ".diff_m"  # ending in LightX2V for the parameter `modulation` of a block or the head


class _KnownPrefixes(NamedTuple):
    """Known prefixes of tensor names, and the dialect (program) that each prefix shows; "" for none."""

    for_undotted_names: Mapping[str, str]  # prefix -> dialect
    for_dotted_names: Mapping[str, str]  # prefix of names with dots -> dialect
    underscored_tool_prefixes: tuple[str, ...]  # prefixes that are followed by a name with underscores
    experts: Mapping[str, str]  # prefix of the second network of a pipeline -> its expert


@cache
def find_networks() -> Mapping[str, str]:
    """Map each expert's network prefix in diffusers' pipelines to the name of the expert."""
    experts = {}
    for family in FAMILIES:
        for network, expert in family.experts:
            experts[f"{network}."] = expert
    return experts


@cache
def find_expert_prefixes() -> Mapping[str, str]:
    """Map each name prefix of an expert, in LoRA files for several experts, to the name of the expert."""
    experts = dict(find_networks())
    for family in FAMILIES:
        for name, expert in family.more_experts:
            experts[f"{name}."] = expert
    return experts


@cache
def _known_prefixes() -> _KnownPrefixes:
    """Return the known prefixes of names in LoRA files, and what each of them shows."""
    expert_prefixes = find_expert_prefixes()
    # prefixes of other networks in diffusers' pipelines that have the same modules
    diffusers_prefixes = tuple(prefix for family in FAMILIES for prefix in family.more_diffusers_prefixes)
    kohya_prefixes = [prefix for rules in kohya.BY_KIND.values() for prefix in rules.prefixes]
    dialects = {
        OURS: IN_OUR_NAMES,
        **dict.fromkeys(kohya_prefixes, IN_OUR_NAMES),
        "lycoris_": "LyCORIS",
        "lora_transformer_": "OneTrainer",
        "lora_transformer-": "InvokeAI",
        "Hunyuan_video_I2V_lora_": "HunyuanVideo-I2V",
        "base_model.model.": "PEFT",
        IN_COMFYUI: "other",
        "pipe.": "DiffSynth",
        **dict.fromkeys((*diffusers_prefixes, *expert_prefixes), "diffusers"),
        UNET_IN_DIFFUSERS: "diffusers",
        **dict.fromkeys(("base_model.", "model.", "module.", "dit.", "net.", "denoiser."), ""),
    }
    experts_by_prefix = {}
    for prefix, expert in expert_prefixes.items():
        if prefix != IN_DIFFUSERS:
            experts_by_prefix[prefix] = expert
            experts_by_prefix[prefix.replace(".", "_")] = expert
    # some programs write names with underscores only
    underscored = {prefix.replace(".", "_"): dialect for prefix, dialect in dialects.items()}
    return _KnownPrefixes(
        for_undotted_names={**dialects, **underscored},
        # only with dots: with an underscore, the first of them is our own prefix
        for_dotted_names={**dialects, **dict.fromkeys(("lora_unet.", "lora_transformer."), "OneTrainer")},
        # such as `lora_transformer_`
        underscored_tool_prefixes=tuple(prefix for prefix in dialects if prefix.endswith("_")),
        experts=experts_by_prefix,
    )


class ParsedKey(NamedTuple):
    """A tensor name in a transformer LoRA, split into module path and factor name, with its dialect."""

    path: str  # path of the module in the file, without prefixes: `blocks.0.attn1.to_q`
    full_path: str  # path of the module in the file, with prefixes
    suffix: str  # our name of the part: `lora_down.weight`
    dialect: str


class ParsedTextKey(NamedTuple):
    """A tensor name in a text encoder's LoRA, split into prefix, encoder number, and module path."""

    start: str  # prefix that names the encoder
    number: int  # number of the encoder, from 1
    path: str  # rest of the name


class StrippedPath(NamedTuple):
    """A module path without prefixes, and the dialect (program) that the removed prefixes show."""

    path: str
    dialect: str


def split_key(key: str) -> ParsedKey | None:
    """Split a transformer LoRA's key into module path, factor name and dialect; None for other keys."""
    key = _PROCESSOR.sub(
        lambda match: f".{_PROCESSOR_LAYERS[match['layer']]}.lora_{match['factor']}.weight", key
    )
    if key.endswith(_MODULATION):
        key = f"{key.removesuffix(_MODULATION)}.modulation.diff"
    full_path, part = split_end(key)
    if not part:
        return None
    stripped = strip_known_prefixes(full_path)
    return ParsedKey(stripped.path, full_path, part, stripped.dialect)


def split_end(key: str) -> tuple[str, str]:
    """Split a key into the path of its module and our name for its ending.

    `x.lora_A.default.weight` gives `x` and `lora_down.weight`; the second is "" if the ending is unknown.
    """
    match = _FACTOR.search(key)
    if match is not None:
        part = f"{FACTORS[match['factor']]}{match['leaf'] or '.weight'}"
        return (key[: match.start()], part) if part in FACTOR_NAMES else (key, "")
    key = in_default_spelling(key)
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), "")
    return key.removesuffix(ending), _ENDINGS.get(ending, "")


def in_default_spelling(key: str) -> str:
    """Replace the ending of a tensor name with ours if another program spells it differently."""
    for spelling, replacement in SPELLINGS:
        key = spelling.sub(replacement, key)
    return key


def list_stripped_paths(path: str) -> list[StrippedPath]:
    """Return a module's path with 0, 1, 2, ... known prefixes removed.

    The dialect of each result comes from the first removed prefix that reveals one.
    """
    special_dialect = next((dialect for prefix, dialect in _SPECIAL.items() if path.startswith(prefix)), "")
    path = _WRAPPERS.sub("", path).rstrip("_.")
    stages = [StrippedPath(path, special_dialect)]
    known = _known_prefixes()
    # a name with the prefix of a tool has underscores, even if it also contains a dot
    is_dotted = "." in path and not path.startswith(known.underscored_tool_prefixes)
    dialects = known.for_dotted_names if is_dotted else known.for_undotted_names
    while True:
        prefix = next((prefix for prefix in dialects if path.startswith(prefix)), "")
        if not prefix:
            return stages
        path = path.removeprefix(prefix).lstrip("_")
        stages.append(StrippedPath(path, stages[-1].dialect or dialects[prefix]))


def strip_known_prefixes(path: str) -> StrippedPath:
    """Return a module path without prefixes, and the dialect (program) that the prefixes show.

    Prefixes are removed one by one until the path belongs to a module of a known family. If that never
    happens, paths with underscores are compared instead; if none is known, all prefixes are removed.
    """
    stages = list_stripped_paths(path)
    stripped = next((stage for stage in stages if is_known_module(stage.path, dotted=True)), None)
    if stripped is None:
        stripped = next(
            (stage for stage in stages if is_known_module(stage.path.replace(".", "_"))), stages[-1]
        )
    return StrippedPath(stripped.path, stripped.dialect or "without prefix")


def dialect_in_words(dialect: str) -> str:
    """Describe a naming dialect by the program that uses it: `names as in ComfyUI`."""
    words = [_IN_WORDS.get(name, name) for name in dialect.split(" + ")]
    return "names as in " + " + ".join(words)


def further_expert(key: str) -> str | None:
    """Return the expert that a key of a pipeline's second transformer is for, by its prefix; else None."""
    for stripped in list_stripped_paths(key):
        for start, expert in _known_prefixes().experts.items():
            if stripped.path.startswith(start):
                return expert
    return None


def split_text(key: str) -> ParsedTextKey | None:
    """Split a text encoder's key into prefix, encoder number and module path; None for other keys."""
    for stripped in list_stripped_paths(key):
        match = _TEXT.match(stripped.path)
        if match is not None:
            number = int(match["ours"] or match["short"] or match["pipeline"] or 1)
            # CLIP-G is SDXL's second encoder: `clip_g` in ComfyUI's names, number 1 in the original names
            is_second = "clip_g" in (match["comfy"], match["alone"]) or match["ldm"] == "1"
            prefix = stripped.path[: match.end()]
            path = stripped.path[match.end() :]
            return ParsedTextKey(prefix, 2 if is_second else number, path)
        if stripped.path.startswith(_UNPREFIXED_TEXT_LAYERS):
            return ParsedTextKey("", 1, stripped.path)
    return None


def name_text(key: ParsedTextKey, family: FamilyNames | None) -> str | None:
    """Return our name for a text encoder LoRA's tensor: `lora_te1_text_model_...`; None if unknown.

    Layer names identify the encoder, because programs number encoders differently.
    """
    path, part = split_end(_PROCESSOR.sub(r".\g<layer>_proj.lora_\g<factor>.weight", key.path))
    if not part:
        return None
    kind, name = _text_layer(_WRAPPERS.sub("", path).rstrip("_"))
    prefix = _text_prefix(key, kind, family)
    return None if prefix is None else f"{prefix}_{name}.{part}"


def _text_layer(path: str) -> tuple[str, str]:
    """Return the kind of encoder ("" if unknown) and the underscored name of the layer."""
    # Prefixes are removed one by one until the layer is known. An unknown layer keeps all its prefixes.
    full_name = ""  # the name with all prefixes
    while True:
        name = path.replace(".", "_")
        if name.startswith(_CLIP_WITHOUT_TEXT_MODEL):  # CLIP as in transformers 5 and later
            name = CLIP_LAYER_PREFIX + name
        full_name = full_name or name
        if name.removeprefix(CLIP_LAYER_PREFIX) == TEXT_PROJECTION:  # some files have it inside `text_model`
            return CLIP_LAYER_PREFIX, TEXT_PROJECTION
        for kind in (CLIP_LAYER_PREFIX, T5_LAYER_PREFIX, LANGUAGE_MODEL_LAYER_PREFIX):
            if name.startswith(kind):
                return kind, name
        prefix = next((prefix for prefix in _TEXT_LAYER_PREFIXES if path.startswith(prefix)), "")
        if not prefix:
            return "", full_name
        path = path.removeprefix(prefix)


def _text_prefix(key: ParsedTextKey, kind: str, family: FamilyNames | None) -> str | None:
    """Return our prefix for a text encoder, such as `lora_te1`."""
    # The kind of its layers identifies the encoder; the number in the file counts encoders of this kind.
    kind_by_prefix = dict(_FALLBACK_ENCODERS if family is None else family.encoders)
    encoder_prefixes = [prefix for prefix, encoder_kind in kind_by_prefix.items() if encoder_kind == kind]
    file_prefix = key.start.rstrip("_.-").replace("lycoris_", "lora_")
    # files for Stable Diffusion 1 and 2 call their only CLIP lora_te
    is_only_clip = kind == CLIP_LAYER_PREFIX and file_prefix == "lora_te"
    if is_only_clip and (family is None or len(encoder_prefixes) > 1):
        return file_prefix
    if encoder_prefixes:
        # a number above the family's count of such encoders means the last encoder
        return encoder_prefixes[min(key.number, len(encoder_prefixes)) - 1]
    if not file_prefix.startswith("lora_te"):  # another program's prefix
        file_prefix = next(iter(kind_by_prefix)) if key.number == 1 else f"lora_te{key.number}"
    is_other_kind_prefix = kind != "" and file_prefix in kind_by_prefix
    return None if is_other_kind_prefix else file_prefix


def _find_known_module_prefix(path: str) -> str:
    """Return the shortest prefix whose removal leaves the name of a known module; "" if there is none."""
    # pieces end with their separator, so that joining them gives the path again
    pieces = re.split(r"(?<=[._])", path)
    for count in range(1, len(pieces)):
        if is_known_module("".join(pieces[count:]).replace(".", "_")):
            return "".join(pieces[:count])
    return ""


def describe_unknown(paths: Iterable[str]) -> str:
    """Describe what is unknown about tensor names, for a message.

    The result names an unknown prefix or ending of a known module's path, or else how all names begin. It is
    "" if there are no paths.

    Args:
        paths: Paths with their prefixes.
    """
    paths = list(paths)
    if not paths:
        return ""
    for path in paths:
        prefix = _find_known_module_prefix(path)
        if prefix:
            return f"begin with {prefix}"
        module_path, dot, end = path.rpartition(".")
        if dot and is_known_module(strip_known_prefixes(module_path).path.replace(".", "_")):
            return f"have .{end} after the module name"
    # no known module in any path: show what all paths begin with, up to a separator
    common_start = os.path.commonprefix(paths)
    last_separator = max(common_start.rfind("."), common_start.rfind("_"))
    return f"begin with {common_start[: last_separator + 1] or paths[0].partition('.')[0]}"
