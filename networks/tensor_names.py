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

from networks.deltas import PARTS
from networks.kinds import KINDS
from networks.kinds.composing import ENDS, MAGNITUDES, SPELLINGS
from networks.module_names import FAMILIES, is_name
from networks.names.layouts import (
    IN_COMFYUI,
    IN_DIFFUSERS,
    OF_CLIP,
    OF_LANGUAGE_MODEL,
    OF_LTX_FORK,
    OF_T5,
    OURS,
    UNET_IN_DIFFUSERS,
    FamilyNames,
)
from networks.names.texts import TEXT_PROJECTION

IN_OUR_NAMES = "ours"  # dialect of the names that established trainers write
# long prefix -> dialect to report, although its parts are removed one by one like other prefixes
_SPECIAL = {OF_LTX_FORK: "musubi-tuner for LTX-2", "lora_unet__": "VideoX-Fun"}
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
_TEXT_STARTS = ("transformer.", "language_model.", "model.", "base_model.model.", "module.", "qwen3.")
# beginnings of names in files of single encoders, which have no prefix
_OF_CLIP_ALONE = ("encoder_layers_", "embeddings_", "final_layer_norm")
_BARE_TEXTS = ("text_model.encoder.", "encoder.block.")
# encoders to assume if the family is unknown
_OF_ALL = (*FamilyNames.encoders, ("lora_te2", OF_CLIP), ("lora_te", OF_LANGUAGE_MODEL))
# names of the LoRA factors in other programs -> ours
FACTORS = {"A": "lora_down", "B": "lora_up", "a": "lora_down", "b": "lora_up"}
FACTORS |= {"down": "lora_down", "up": "lora_up"}
# our parts -> their endings in PEFT, diffusers and ComfyUI
PEFT_ENDS = {f"{FACTORS[x]}.{leaf}": f"lora_{x}.{leaf}" for x in "AB" for leaf in ("weight", "bias")}
# ending of DoRA magnitudes, only in diffusers
MAGNITUDES_END = next((end.removeprefix(".") for end, part in ENDS.items() if part == MAGNITUDES), "")
# ending in any program -> our part
_ENDINGS = {
    **ENDS,
    ".w_norm": "diff",  # LyCORIS, of norms
    ".b_norm": "diff_b",
    **dict.fromkeys((".lora_alpha", ".network_alpha", ".lora.alpha"), "alpha"),
    **{f".{part}": part for part in PARTS},
}
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)
# `.lora_A.weight`, `.lora.down.weight`, `.lora_linear_layer.up.weight`; `.lora_A`, a bare parameter; PEFT's
# `.lora_A.default.weight`, with any adapter name instead of `default` (files saved by PEFT itself lack it)
_FACTOR = re.compile(
    r"\.lora(?:_linear_layer)?[._]?(?:lora_)?(?P<factor>[ABab]|down|up)(?:(?:\.[^.]+)*?(?P<leaf>\.weight|\.bias))?$"
)
# diffusers before PEFT: factors belong to the attention module, not to its layers
_PROCESSOR = re.compile(r"(\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<factor>down|up)\.weight$")
_OF_PROCESSOR = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_MODULATION = ".diff_m"  # LightX2V: `modulation` of the block (or head) whose path precedes it


class _Starts(NamedTuple):
    """Known prefixes of names, with the dialect that each shows ("": none); several may be combined."""

    everywhere: Mapping[str, str]  # prefixes of all names
    dotted: Mapping[str, str]  # prefixes of names with dots
    of_tools: tuple[str, ...]  # prefixes that are followed by an underscored name
    further: Mapping[str, str]  # prefix of a pipeline's second network -> its expert


@cache
def find_networks() -> Mapping[str, str]:
    """Return prefix of tensor names -> expert, for the networks in diffusers' pipelines.

    This reads the names of all families, as `find_expert_starts` does.
    """
    return {f"{network}.": expert for family in FAMILIES for network, expert in family.experts}


@cache
def find_expert_starts() -> Mapping[str, str]:
    """Return the same as `find_networks`, with other prefixes in files that hold several experts."""
    more_starts = {f"{name}.": expert for family in FAMILIES for name, expert in family.more_experts}
    return {**find_networks(), **more_starts}


@cache
def _find_starts() -> _Starts:
    """Return the known prefixes of names in LoRA files."""
    expert_starts = find_expert_starts()
    # of networks in pipelines of diffusers with the same modules
    more_starts = tuple(start for family in FAMILIES for start in family.more_starts)
    starts = {
        OURS: IN_OUR_NAMES,
        **{start: dialect for kind in KINDS for start, dialect in kind.starts.items()},
        "lycoris_": "LyCORIS",
        "lora_transformer_": "OneTrainer",
        "lora_transformer-": "InvokeAI",
        "Hunyuan_video_I2V_lora_": "HunyuanVideo-I2V",
        "base_model.model.": "PEFT",
        IN_COMFYUI: "other",
        "pipe.": "DiffSynth",
        **dict.fromkeys((*more_starts, *expert_starts), "diffusers"),
        UNET_IN_DIFFUSERS: "diffusers",
        **dict.fromkeys(("base_model.", "model.", "module.", "dit.", "net.", "denoiser."), ""),
    }
    return _Starts(
        # in names without dots they have "_" for "."
        everywhere={**starts, **{start.replace(".", "_"): dialect for start, dialect in starts.items()}},
        # underscored, the first one is ours
        dotted={**starts, **dict.fromkeys(("lora_unet.", "lora_transformer."), "OneTrainer")},
        of_tools=tuple(start for start in starts if start.endswith("_")),
        further={
            form: expert
            for start, expert in expert_starts.items()
            if start != IN_DIFFUSERS
            for form in (start, start.replace(".", "_"))
        },
    )


class Place(NamedTuple):
    """The parts of the name of a tensor of a LoRA for a DiT."""

    path: str  # path of the module in the file, without prefixes: `blocks.0.attn1.to_q`
    full_path: str  # path of the module in the file, with prefixes
    part: str  # our name of the part: `lora_down.weight`
    dialect: str


class TextPlace(NamedTuple):
    """The parts of the name of a tensor of a text encoder's LoRA."""

    start: str  # prefix that shows the encoder
    number: int  # number of the encoder, from 1
    path: str  # rest of the name


class Bare(NamedTuple):
    """A path after removal of some prefixes, and the dialect that these show."""

    path: str
    dialect: str


def split_key(key: str) -> Place | None:
    """Split a key for a transformer into its parts; None if it does not belong to a LoRA."""
    key = _PROCESSOR.sub(lambda match: f".{_OF_PROCESSOR[match['layer']]}.lora_{match['factor']}.weight", key)
    if key.endswith(_MODULATION):
        key = f"{key.removesuffix(_MODULATION)}.modulation.diff"
    full_path, part = split_end(key)
    if not part:
        return None
    bare = strip_starts(full_path)
    return Place(bare.path, full_path, part, bare.dialect)


def split_end(key: str) -> tuple[str, str]:
    """Split a key into the path of its module and our name for the rest.

    `x.lora_A.default.weight` gives `x` and `lora_down.weight`; the second is "" if the ending is unknown.
    """
    match = _FACTOR.search(key)
    if match is not None:
        part = f"{FACTORS[match['factor']]}{match['leaf'] or '.weight'}"
        return (key[: match.start()], part) if part in PARTS else (key, "")
    key = in_default_spelling(key)
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), "")
    return key.removesuffix(ending), _ENDINGS.get(ending, "")


def in_default_spelling(key: str) -> str:
    """Replace the ending of a tensor's name in a file by ours if a kind of network spells it differently."""
    for spelling, replacement in SPELLINGS:
        key = spelling.sub(replacement, key)
    return key


def without_starts(path: str) -> list[Bare]:
    """Return a module's path with 0, 1, 2 ... known prefixes removed.

    The dialect of each result is that of the first prefix that was removed.
    """
    special = next((dialect for start, dialect in _SPECIAL.items() if path.startswith(start)), "")
    path = _WRAPPERS.sub("", path).rstrip("_.")
    stages = [Bare(path, special)]
    known = _find_starts()
    starts = known.dotted if "." in path and not path.startswith(known.of_tools) else known.everywhere
    while True:
        start = next((start for start in starts if path.startswith(start)), "")
        if not start:
            return stages
        path = path.removeprefix(start).lstrip("_")
        stages.append(Bare(path, stages[-1].dialect or starts[start]))


def strip_starts(path: str) -> Bare:
    """Return a module's path without prefixes, and the dialect.

    Prefixes are removed one by one until a known family has a module of that path, or else of that
    underscored name; if none has, all are removed.
    """
    stages = without_starts(path)
    bare = next((stage for stage in stages if is_name(stage.path, dotted=True)), None)
    if bare is None:
        bare = next((stage for stage in stages if is_name(stage.path.replace(".", "_"))), stages[-1])
    return Bare(bare.path, bare.dialect or "without prefix")


def dialect_in_words(dialect: str) -> str:
    """Describe a dialect by the program that uses it: `names as in ComfyUI`."""
    words = [_IN_WORDS.get(name, name) for name in dialect.split(" + ")]
    return "names as in " + " + ".join(words)


def further_expert(key: str) -> str | None:
    """Return the expert of a diffusers key that begins with the name of a second network; else None."""
    for bare in without_starts(key):
        for start, expert in _find_starts().further.items():
            if bare.path.startswith(start):
                return expert
    return None


def split_text(key: str) -> TextPlace | None:
    """Split a text encoder's name; None for other names."""
    for bare in without_starts(key):
        match = _TEXT.match(bare.path)
        if match is not None:
            number = int(match["ours"] or match["short"] or match["pipeline"] or 1)
            is_second = "clip_g" in (match["comfy"], match["alone"]) or match["ldm"] == "1"
            start = bare.path[: match.end()]
            path = bare.path[match.end() :]
            return TextPlace(start, 2 if is_second else number, path)
        if bare.path.startswith(_BARE_TEXTS):
            return TextPlace("", 1, bare.path)
    return None


def name_text(place: TextPlace, family: FamilyNames | None) -> str | None:
    """Return our name for a tensor of a text encoder's LoRA: `lora_te1_text_model_...`; None if unknown.

    The names of the layers identify the encoder, because programs number encoders differently.
    """
    path, part = split_end(_PROCESSOR.sub(r".\g<layer>_proj.lora_\g<factor>.weight", place.path))
    if not part:
        return None
    kind, name = _text_layer(_WRAPPERS.sub("", path).rstrip("_"))
    prefix = _text_prefix(place, kind, family)
    return None if prefix is None else f"{prefix}_{name}.{part}"


def _text_layer(path: str) -> tuple[str, str]:
    """Return the kind of encoder ("" if unknown) and the underscored name of the layer.

    Prefixes are removed one by one until the layer is known. An unknown layer keeps all prefixes.
    """
    unknown = ""
    while True:
        name = path.replace(".", "_")
        if name.startswith(_OF_CLIP_ALONE):  # CLIP, as transformers 5 and later has it
            name = OF_CLIP + name
        unknown = unknown or name
        if name.removeprefix(OF_CLIP) == TEXT_PROJECTION:
            return OF_CLIP, TEXT_PROJECTION
        for kind in (OF_CLIP, OF_T5, OF_LANGUAGE_MODEL):
            if name.startswith(kind):
                return kind, name
        forms = (form for start in _TEXT_STARTS for form in (start, start.replace(".", "_")))
        start = next((form for form in forms if path.startswith(form)), "")
        if not start:
            return "", unknown
        path = path.removeprefix(start)


def _text_prefix(place: TextPlace, kind: str, family: FamilyNames | None) -> str | None:
    """Return our prefix for an encoder; None if the file's name for it belongs to another kind of encoder."""
    encoders = _OF_ALL if family is None else family.encoders
    prefixes = [prefix for prefix, layers in encoders if layers == kind]
    label = place.start.rstrip("_.-").replace("lycoris_", "lora_")
    if not label.startswith("lora_te"):
        first_prefix, _ = encoders[0]
        label = first_prefix if place.number == 1 else f"lora_te{place.number}"
    elif kind == OF_CLIP and label == "lora_te" and (family is None or len(prefixes) > 1):
        prefixes = [label]  # Stable Diffusion 1 and 2 call their single one so
    if prefixes:
        return prefixes[min(place.number, len(prefixes)) - 1]
    if kind and label in dict(encoders):
        return None  # the family has another kind of encoder under this prefix
    return label


def describe_unknown(paths: Iterable[str]) -> str:
    """Describe unknown names: what surrounds the path of a known module, or else how all names begin.

    Args:
        paths: Paths with their prefixes.

    Returns:
        A phrase for a message; "" if there are no paths.
    """
    paths = list(paths)
    if not paths:
        return ""
    for path in paths:
        pieces = re.split(r"(?<=[._])", path)
        for count in range(1, len(pieces)):
            if is_name("".join(pieces[count:]).replace(".", "_")):
                return f"begin with {''.join(pieces[:count])}"
        begin, dot, end = path.rpartition(".")
        if dot and is_name(strip_starts(begin).path.replace(".", "_")):
            return f"have .{end} behind the module's"
    common = os.path.commonprefix(paths)
    last_separator = max(common.rfind("."), common.rfind("_"))
    return f"begin with {common[: last_separator + 1] or paths[0].partition('.')[0]}"
