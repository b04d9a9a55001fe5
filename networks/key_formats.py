"""Dialects of tensor names in LoRA files: recognise them, bring them into ours.

ours        lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight   .alpha
other       diffusion_model.blocks.0.self_attn.q.lora_A.weight   .lora_B.weight   (ComfyUI; alpha is optional)
diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, base_model.model. ... (PEFT; .lora.down / .lora.up)
LyCORIS     lycoris_blocks_0_self_attn_q.hada_w1_a ...
LTX-2       lora_unet_model_transformer_blocks_0_attn1_to_q.lora_down.weight (musubi-tuner's fork)
VideoX-Fun  lora_unet__blocks_0_self_attn_q.lora_down.weight
DiffSynth   pipe.dit.blocks.0.self_attn.q.lora_A.default.weight
LightX2V    as other, with diffusion_model.blocks.0.norm3.diff   .diff_b   diffusion_model.blocks.0.diff_m
U-Nets      unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, also with
            attn1.processor.to_q_lora.down.weight (diffusers before PEFT); input_blocks_1_1_... in place of
            down_blocks_0_attentions_0_... (LDM, sd-scripts for SDXL)
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from networks.deltas import DORA, LORA, PARTS, Factors
from networks.module_names import FAMILIES, alias, likely_families, replace_dots, sizes_fit
from networks.names.layouts import FIRST_ENCODER, UNET_IN_DIFFUSERS, FamilyNames

OURS = "lora_unet_"
OTHER = "diffusion_model."
_UNDERSCORED = {
    "lora_unet_model_": "musubi-tuner for LTX-2",
    "lora_unet__": "VideoX-Fun",
    OURS: "ours",
    "lycoris_": "LyCORIS",
    "lora_transformer_": "OneTrainer",
}
_DOTTED = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "other",
    OTHER: "other",
    "pipe.dit.": "DiffSynth",
    "transformer.": "diffusers",
    "transformer_2.": "diffusers",  # of the low-noise expert
    "unet.": "diffusers",
}
_IN_WORDS = {
    "": "sd-scripts and here",
    "ours": "sd-scripts and here",
    "other": "ComfyUI",
    "without prefix": "files without a prefix",
}
_TEXT_ENCODERS = (
    *("lora_te", "lycoris_te", "text_encoder", "te1", "te2", "cond_stage_model.", "conditioner."),
    *("clip_l.", "clip_g.", "t5."),
)
# starts of names in diffusers, ComfyUI and OneTrainer; the second one of diffusers is told by what follows
_FIRST_ENCODERS = ("text_encoder.", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.")
_OTHER_ENCODERS = (
    *("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.transformer.", "clip_g."),
    *("text_encoders.t5xxl.transformer.", "t5."),
)
_IN_CLIP = "text_model."
_ENDINGS = {
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_B.bias": "lora_up.bias",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_magnitude_vector": DORA,
    ".w_norm": "diff",  # LyCORIS, of norms
    ".b_norm": "diff_b",
    **{f".{part}": part for part in PARTS},
}
# PEFT: `.lora_A.default.weight`, with any name in place of `default`, which a saved adapter has lost
_WITH_ADAPTER = re.compile(
    r"\.(?:(?P<factor>lora_[AB])\.[^.]+(?P<leaf>\.weight|\.bias)|lora_magnitude_vector(\.[^.]+){1,2})$"
)
# diffusers before PEFT: factors beside the attention, not in its layers
_PROCESSOR = re.compile(r"(\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<factor>down|up)\.weight$")
_LEAVES = ("weight", "bias")
# FramePack's blocks in the other dialect as the known tuner writes it: points for most underscores, also
# for that of `transformer_blocks`, whose first half is no prefix then
_TAKEN_APART = f"{OTHER}transformer.blocks."
_MODULATION = ".diff_m"  # LightX2V: of `modulation` in a block or in the head, whose path stands before
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)

# what other kinds of networks end their tensors' names with, which are no sum of matrices to add to a weight
_OTHER_KINDS = {
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "OFT or BOFT": (".oft_blocks", ".oft_diag", ".oft_R", ".oft_R.weight", ".oft_r", ".boft_R", ".boft_s"),
    "(IA)3": (".on_input", ".ia3_l"),
    "VeRA": (".vera_lambda_b", ".vera_lambda_d"),
}


@dataclass(frozen=True)
class NativeTensors:
    """Tensors of a LoRA file under our names, and the keys that have none."""

    tensors: dict[str, Tensor]
    dialect: str  # for messages
    text_encoder: tuple[str, ...]  # keys that change a text encoder and have no name here
    texts: Mapping[str, Tensor]  # that change text encoders, as `lora_te1_text_model_....lora_down.weight`
    unknown: tuple[str, ...]  # keys that are no part of a LoRA, or name a part once more
    # our module -> its path as the file writes it, without the prefix: `blocks.0.attn1.to_q`
    paths: Mapping[str, str]


def to_native(tensors: Mapping[str, Tensor], family_hint: str | None = None) -> NativeTensors:
    """Name the tensors of any dialect as we do.

    Values are unchanged, also a missing alpha; PEFT's magnitudes become columns.
    """
    split = {key: _split(key) for key in tensors}
    found = {key: place for key, place in split.items() if place is not None}
    modules = {path: replace_dots(path) for path, _, _ in found.values()}
    dialects = sorted({dialect for _, _, dialect in found.values()})
    factors: dict[str, dict[str, Tensor]] = {}
    for key, (path, part, _) in found.items():
        factors.setdefault(OURS + modules[path], {})[part] = tensors[key]
    families = families_of(factors, family_hint)
    names = {path: OURS + _alias(module, families) for path, module in modules.items()}
    keys: dict[str, str] = {}  # our name -> key in the file; a second key of one name is reported
    for key, (path, part, _) in found.items():
        keys.setdefault(f"{names[path]}.{part}", key)
    native = {name: tensors[key] for name, key in keys.items()}
    for name, key in keys.items():
        if ".lora_magnitude_vector" in key:
            # PEFT's: out, of convolutions 1 x out x 1 x 1; LyCORIS' and ours: out x 1 (x 1 ...)
            native[name] = tensors[key].reshape(-1, *[1] * max(tensors[key].ndim - 1, 1))
    used = set(keys.values())
    rest = [key for key in tensors if key not in used]
    has_second = any(key.startswith(_OTHER_ENCODERS) for key in rest)
    others = [one.first_encoder for one in families if one.first_encoder != FIRST_ENCODER]
    first = others[0] if others and not (has_second and len(families) > 1) else FIRST_ENCODER
    names_of_texts = {key: _name_of_text(key, first) for key in rest if key.startswith(_TEXT_ENCODERS)}
    texts = {name: tensors[key] for key, name in names_of_texts.items() if name is not None}
    strange = tuple(key for key, name in names_of_texts.items() if name is None)
    unknown = tuple(key for key in rest if not key.startswith(_TEXT_ENCODERS))
    paths = {names[path]: path for path, _, _ in found.values()}
    return NativeTensors(native, " + ".join(dialects), strange, texts, unknown, paths)


def _alias(module: str, families: Sequence[FamilyNames]) -> str:
    """Return our name for one of another layout, if it is the same in all families that it may be for."""
    found = {alias(module, family) for family in families}
    return found.pop() if len(found) == 1 else module


def _name_of_text(key: str, first: str) -> str | None:
    """Return our name for a tensor of a text encoder's LoRA: `lora_te1_text_model_...`; None if unknown.

    first: how the family calls its first text encoder.
    """
    key = _WITH_ADAPTER.sub(_without_adapter, key)
    key = _PROCESSOR.sub(r".\g<layer>_proj.lora_\g<factor>.weight", key)
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), None)
    if ending is None:
        return None
    path = key.removesuffix(ending)
    if not path.startswith("lora_te"):
        starts = (*_OTHER_ENCODERS, *_FIRST_ENCODERS)
        start = next((start for start in starts if path.startswith(start)), None)
        if start is None:
            return None
        path = path.removeprefix(start)
        if path.startswith("encoder.layers."):  # CLIP, as transformers 5 and later has it
            path = _IN_CLIP + path
        other = "lora_te2" if path.startswith(_IN_CLIP) else "lora_te3"  # OpenCLIP's or T5
        path = f"{first if start in _FIRST_ENCODERS else other}_{replace_dots(path)}"
    return f"{path}.{_ENDINGS[ending]}"


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind of network that is not supported and a key that shows it, or None if there is none."""
    return next(
        ((kind, key) for key in keys for kind, endings in _OTHER_KINDS.items() if key.endswith(endings)), None
    )


def module_of_tensor(name: str) -> tuple[str, str]:
    """A checkpoint's `model.diffusion_model.blocks.0.ffn.0.weight` -> (`blocks_0_ffn_0`, `weight`).

    A parameter that is no module's weight or bias is a module of its own, as LoRA files have it:
    `blocks.0.modulation` -> (`blocks_0_modulation`, `weight`).
    """
    path, _, leaf = name.rpartition(".")
    if leaf not in _LEAVES:
        path, leaf = name, "weight"
    for prefix in ("model.diffusion_model.", "model.model.", OTHER, "transformer.", "module.", "_orig_mod."):
        path = path.removeprefix(prefix)
    return replace_dots(path), leaf


def _split(key: str) -> tuple[str, str, str] | None:
    """Return the parts of a key; None if it belongs to no LoRA for a DiT.

    They are the path of the module as the file writes it, without the prefix (`blocks.0.attn1.to_q`), our
    name of the part (`lora_down.weight`) and the dialect.
    """
    key = _WITH_ADAPTER.sub(_without_adapter, key)
    layers = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    key = _PROCESSOR.sub(lambda found: f".{layers[found['layer']]}.lora_{found['factor']}.weight", key)
    if key.endswith(_MODULATION):
        key = f"{key.removesuffix(_MODULATION)}.modulation.diff"
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), None)
    if ending is None or key.startswith(_TEXT_ENCODERS):
        return None
    path, part = key.removesuffix(ending), _ENDINGS[ending]
    for prefix, dialect in _UNDERSCORED.items():
        if path.startswith(prefix):
            return path.removeprefix(prefix), part, dialect
    dialects = [dialect for prefix, dialect in _DOTTED.items() if path.startswith(prefix)]
    for prefix in (OTHER,) if path.startswith(_TAKEN_APART) else _DOTTED:
        path = path.removeprefix(prefix)
    return path, part, dialects[0] if dialects else "without prefix"


def dialect_in_words(dialect: str) -> str:
    """Return where the names of a LoRA's tensors are usual: `names as in ComfyUI`."""
    return "names as in " + " + ".join(_IN_WORDS.get(each, each) for each in dialect.split(" + "))


def _without_adapter(found: re.Match[str]) -> str:
    return f".{found['factor']}{found['leaf']}" if found["factor"] else ".lora_magnitude_vector"


def families_of(modules: Mapping[str, Factors], hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA's modules, under our names, may be for, as `likely_families`."""
    own = _by_module(modules)
    return likely_families(own, lambda name: _size_of(own[name]), hint)


def can_be_for(family: FamilyNames, modules: Mapping[str, Factors]) -> bool:
    """Tell whether the sizes of a LoRA's modules, under our names, do not contradict the family's."""
    own = _by_module(modules)
    return sizes_fit(family, own, lambda name: _size_of(own[name]))


def _by_module(modules: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name.removeprefix(OURS): one for name, one in modules.items() if name.startswith(OURS)}


def _size_of(factors: Factors) -> tuple[int, int] | None:
    """Return rows and columns of the change of a weight; None if there is none, or factors are damaged.

    By shapes alone: the first operation on the meta device takes seconds.
    """
    shapes = {part: tuple(one.shape) for part, one in factors.items()}
    try:
        if "diff" in shapes:
            rows, *columns = shapes["diff"]
        elif LORA[0] in shapes:
            (rank, *columns), (rows, inner, *_) = shapes[LORA[0]], shapes[LORA[1]]
            columns += shapes.get("lora_mid.weight", ())[2:]
            rows = rows if rank == inner else 0
        elif "hada_w1_a" in shapes:  # beside a core it is stored r x out
            rows = shapes["hada_w1_a"]["hada_t1" in shapes]
            columns = [shapes["hada_w1_b"][1], *shapes.get("hada_t1", ())[2:]]
        else:
            first, second = (shapes.get(name) for name in ("lokr_w1", "lokr_w2"))
            first = first or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
            if second is None:
                core = shapes.get("lokr_t2", ())
                second = shapes["lokr_w2_a"][bool(core)], shapes["lokr_w2_b"][1], *core[2:]
            rows, columns = first[0] * second[0], [*first[1:], *second[1:]]
    except (KeyError, ValueError, IndexError):  # such files are described too
        return None
    return (rows, math.prod(columns)) if rows and columns and math.prod(columns) else None


def family_by_text_width(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the family whose released models take texts as wide as a U-Net's cross-attention does here."""
    sizes = [_size_of(one) for name, one in modules.items() if name.endswith(("attn2_to_k", "attn2_to_v"))]
    widths = {size[1] for size in sizes if size is not None}
    unets = [one for one in FAMILIES if one.start == UNET_IN_DIFFUSERS]
    return next((one for one in unets if {width for width, _ in one.released} == widths), None)
