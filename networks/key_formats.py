"""Dialects of tensor names in LoRA files: recognise them, and rename to ours.

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
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from networks.deltas import DORA, LORA, PARTS, ROWS, Factors, height_of, size_of
from networks.module_names import FAMILIES, alias, is_name, likely_families, sizes_fit
from networks.names import layouts
from networks.names.layouts import OF_CLIP, OF_LANGUAGE_MODEL, OF_LTX_FORK, OF_T5, OURS, FamilyNames
from networks.rewriting import FOR_ALL, MARKS, rewrite

OTHER = "diffusion_model."
# the experts' networks in pipelines of diffusers, which are also prefixes of tensor names
NETWORKS = {f"{network}.": expert for family in FAMILIES for network, expert in family.experts}
# the same, with other prefixes in files that hold several experts
EXPERT_STARTS = NETWORKS | {f"{name}.": expert for family in FAMILIES for name, expert in family.more_experts}
_FURTHER = tuple(start for start in EXPERT_STARTS if start != layouts.IN_DIFFUSERS)
# prefixes of names -> their dialect, if they show it. They are removed, in any order, until none fits; in
# names without dots they have "_" for "."
_STARTS = {
    OURS: "ours",
    "lycoris_": "LyCORIS",
    "lora_transformer_": "OneTrainer",
    "lora_transformer-": "InvokeAI",
    "Hunyuan_video_I2V_lora_": "HunyuanVideo-I2V",
    "base_model.model.": "PEFT",
    OTHER: "other",
    "pipe.": "DiffSynth",
    **dict.fromkeys(EXPERT_STARTS, "diffusers"),
    layouts.UNET_IN_DIFFUSERS: "diffusers",
    **dict.fromkeys(("base_model.", "model.", "module.", "dit.", "net.", "denoiser."), ""),
}
_BOTH_FURTHER = {form: EXPERT_STARTS[one] for one in _FURTHER for form in (one, one.replace(".", "_"))}
_ALL_STARTS = {**_STARTS, **{start.replace(".", "_"): dialect for start, dialect in _STARTS.items()}}
_OF_TOOLS = tuple(start for start in _STARTS if start.endswith("_"))  # what follows has "_" for "."
# names that begin so are named after whose these are, although the rest is taken off singly
_SPECIAL = {OF_LTX_FORK: "musubi-tuner for LTX-2", "lora_unet__": "VideoX-Fun"}
# parts of a path added by wrappers of modules: torch.compile, checkpointing, FSDP
_WRAPPERS = re.compile(
    r"(?:(?<=[._])|^)_(?:orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)(?:[._]|$)"
)
_FAMILY_OF_DIALECT = {"HunyuanVideo-I2V": "hunyuan_video"}
_IN_WORDS = {
    "": "sd-scripts",
    "ours": "sd-scripts",
    "other": "ComfyUI",
    "without prefix": "files without a prefix",
}
# starts of names of text encoders, with a number or name of the encoder
_TEXT = re.compile(
    r"(?:lora_|lycoris_)te(?P<ours>[1-4]?)[_.]|lora_(?:clip|t5)[_-]|te(?P<short>[1-4])[_.]|text_encoder(?:_(?P<pipeline>[2-4]))?[_.]"
    r"|text_encoders\.(?P<comfy>\w+)\.|(?P<alone>clip_[lg]|t5(?:xxl)?)\.|cond_stage_model\.|conditioner\.embedders\.(?P<ldm>\d)\."
)
_TEXT_STARTS = ("transformer.", "language_model.", "model.", "base_model.model.", "module.")
# encoders whose files have no prefix at all
_BARE_TEXTS = ("text_model.encoder.", "encoder.block.")
_OF_ALL = (*FamilyNames.encoders, ("lora_te2", OF_CLIP), ("lora_te", OF_LANGUAGE_MODEL))  # of no known family
_ENDINGS = {
    ".lora_magnitude_vector": DORA,  # PEFT
    ".magnitude": DORA,  # ai-toolkit
    ".w_norm": "diff",  # LyCORIS, of norms
    ".b_norm": "diff_b",
    **dict.fromkeys((".lora_alpha", ".network_alpha", ".lora.alpha"), "alpha"),
    **{f".{part}": part for part in PARTS},
}
# `.lora_A.weight`, `.lora.down.weight`, `.lora_linear_layer.up.weight`; `.lora_A`, which is a parameter;
# PEFT's `.lora_A.default.weight`, with any name in place of `default`, which a saved adapter has lost
_FACTOR = re.compile(
    r"\.lora(?:_linear_layer)?[._]?(?:lora_)?(?P<factor>[ABab]|down|up)(?:(?:\.[^.]+)*?(?P<leaf>\.weight|\.bias))?$"
)
_OF_ADAPTER = re.compile(r"(?<=\.lora_magnitude_vector)(\.[^.]+){1,2}$")
# diffusers before PEFT: factors beside the attention, not in its layers
_PROCESSOR = re.compile(r"(\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<factor>down|up)\.weight$")
_LEAVES = ("weight", "bias")
_MODULATION = ".diff_m"  # LightX2V: of `modulation` in a block or in the head, whose path stands before
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)

# endings of other kinds of networks, whose change is not a sum of matrices to add to a weight
_OTHER_KINDS = {
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "OFT or BOFT": (".oft_blocks", ".oft_diag", ".oft_R", ".oft_R.weight", ".oft_r", ".boft_R", ".boft_s"),
    "(IA)3": (".on_input", ".ia3_l"),
    "LoRA as nunchaku packs it": tuple(
        f".{name}.lora_down" for name in ("qkv_proj", "qkv_proj_context", "mlp_fc1", "mlp_context_fc1")
    ),
    "VeRA": (".vera_lambda_b", ".vera_lambda_d"),
}


@dataclass(frozen=True)
class NativeTensors:
    """Tensors of a LoRA file under our names, and the keys without such a name."""

    tensors: dict[str, Tensor]
    dialect: str  # for messages
    text_encoder: tuple[str, ...]  # keys that change a text encoder and have no name here
    texts: Mapping[str, Tensor]  # for text encoders, such as `lora_te1_text_model_....lora_down.weight`
    unknown: tuple[str, ...]  # keys that are no part of a LoRA
    repeated: Mapping[str, str]  # second key of a part -> the first one
    clash: tuple[str, str] | None  # two keys of one part with different values
    # our module -> its path as the file writes it, without the prefix: `blocks.0.attn1.to_q`
    paths: Mapping[str, str]
    stacked: Mapping[str, int]  # our module -> number of factors that were joined into its own
    family: FamilyNames | None  # by the names
    family_name: str | None  # the only family with names of this form
    unknown_names: str  # description of names that no known family has; else ""


def to_native(
    tensors: Mapping[str, Tensor], family_hint: str | None = None, with_texts: bool = True
) -> NativeTensors:
    """Rename the tensors of any dialect to ours.

    Values are unchanged, except that `rewrite` joins some, and magnitudes become columns; missing alphas stay
    missing. with_texts: also rename tensors of text encoders.
    """
    stacked, of_form = dict[str, int](), ""
    internal = tuple(key for key in tensors if ROWS in key)  # `rewrite` alone may say which rows a part has
    tensors = {key: tensor for key, tensor in tensors.items() if key not in internal}
    if any(map(MARKS.search, tensors)):
        tensors, stacked, of_form = rewrite(tensors)
    split = {key: _split(key) for key in tensors}
    found = {key: place for key, place in split.items() if place is not None}
    modules = {place.path: place.path.replace(".", "_") for place in found.values()}
    dialects = sorted({place.dialect for place in found.values()})
    told = of_form or next((_FAMILY_OF_DIALECT[one] for one in dialects if one in _FAMILY_OF_DIALECT), None)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, place in found.items():
        factors.setdefault(OURS + modules[place.path], {})[place.part] = tensors[key]
    families = families_of(factors, family_hint or told) if factors else []
    family = families[0] if families else None
    aliases = {path: {alias(module, one) for one in families} for path, module in modules.items()}
    names = {  # ours, if all families have the same one
        path: OURS + (next(iter(aliases[path])) if len(aliases[path]) == 1 else module)
        for path, module in modules.items()
    }
    keys: dict[str, str] = {}  # our name -> key in the file; a second key of one name is reported
    for key, place in found.items():
        keys.setdefault(f"{names[place.path]}.{place.part}", key)
    native = {name: tensors[key] for name, key in keys.items()}
    for name, key in keys.items():
        if ".lora_magnitude_vector" in key or key.endswith(".magnitude"):
            # PEFT's: out, of convolutions 1 x out x 1 x 1; LyCORIS' and ours: out x 1 (x 1 ...)
            native[name] = tensors[key].reshape(-1, *[1] * max(tensors[key].ndim - 1, 1))
    of_all = [key for key in FOR_ALL if key in tensors]
    native = {f"{name}.alpha": tensors[key] for key in of_all for name in names.values()} | native
    rest = [key for key in tensors if key not in found and key not in of_all]
    places = {key: one for key in rest if (one := _text_place(key)) is not None}
    # of several with equal names, the one with as many text encoders
    most = max((place[1] for place in places.values()), default=1)
    of_texts = next((one for one in families if len(one.encoders) >= most), family)
    of_texts = of_texts or next((one for one in FAMILIES if one.name == (family_hint or told)), None)
    named = {
        key: _name_of_text(key, *place, of_texts) if with_texts else None for key, place in places.items()
    }
    of_names = [(key, f"{names[place.path]}.{place.part}") for key, place in found.items()]
    of_names += [(key, name) for key, name in named.items() if name is not None]
    for key, name in of_names:
        keys.setdefault(name, key)
    repeated = {key: keys[name] for key, name in of_names if keys[name] != key}
    texts = {name: tensors[key] for key, name in named.items() if name is not None}
    texts = {f"{name.partition('.')[0]}.alpha": tensors[key] for key in of_all for name in texts} | texts
    return NativeTensors(
        tensors=native,
        dialect=" + ".join(dialects),
        text_encoder=tuple(key for key, name in named.items() if name is None),
        texts=texts,
        unknown=(*(key for key in rest if key not in places), *internal),
        repeated=repeated,
        clash=next(
            ((first, key) for key, first in repeated.items() if _differ(tensors[key], tensors[first])), None
        ),
        paths={names[place.path]: place.path for place in found.values()},
        stacked={names[found[key].path]: count for key, count in stacked.items() if key in found},
        family=family,
        family_name=told or None,
        unknown_names=""
        if family is not None or not found
        else _unknown_names([place.whole for place in found.values()]),
    )


def _differ(first: Tensor, second: Tensor) -> bool:
    return first.shape != second.shape or not first.float().equal(second.float())


def _text_place(key: str) -> tuple[str, int, str] | None:
    """Split a text encoder's name into (prefix, number of the encoder, rest); None for other names."""
    for rest, _ in _without_starts(key):
        if (found := _TEXT.match(rest)) is not None:
            number = int(found["ours"] or found["short"] or found["pipeline"] or 1)
            is_second = "clip_g" in (found["comfy"], found["alone"]) or found["ldm"] == "1"
            return rest[: found.end()], 2 if is_second else number, rest[found.end() :]
        if rest.startswith(_BARE_TEXTS):
            return "", 1, rest
    return None


def _name_of_text(key: str, start: str, number: int, path: str, family: FamilyNames | None) -> str | None:
    """Return our name for a tensor of a text encoder's LoRA: `lora_te1_text_model_...`; None if unknown.

    The layers identify the encoder, whatever number a program gives it. start, number, path: the result of
    `_text_place`.
    """
    path = _our_factor(_PROCESSOR.sub(r".\g<layer>_proj.lora_\g<factor>.weight", path))
    ending = next((ending for ending in _BY_LENGTH if path.endswith(ending)), None)
    if ending is None:
        return None
    path = _WRAPPERS.sub("", path.removesuffix(ending)).rstrip("_")
    rests = [path]
    while begin := next((one for one in _TEXT_STARTS if path.startswith((one, one.replace(".", "_")))), ""):
        path = path[len(begin) :]
        rests.append(path)
    layers = (OF_CLIP, OF_T5, OF_LANGUAGE_MODEL)
    names = [one.replace(".", "_") for one in rests]
    # CLIP, as transformers 5 and later has it
    names = [OF_CLIP + name if name.startswith("encoder_layers_") else name for name in names]
    kind, name = next(
        ((one, name) for name in names for one in layers if name.startswith(one)), ("", names[0])
    )
    encoders = _OF_ALL if family is None else family.encoders
    own = [prefix for prefix, one in encoders if one == kind]
    label = start.rstrip("_.-").replace("lycoris_", "lora_")
    if not label.startswith("lora_te"):
        label = encoders[0][0] if number == 1 else f"lora_te{number}"
    elif kind == OF_CLIP and label == "lora_te" and (family is None or len(own) > 1):
        own = [label]  # Stable Diffusion 1 and 2 call their single one so
    if not own and label in dict(encoders) and kind:
        return None  # another encoder than that of this name
    prefix = own[min(number, len(own)) - 1] if own else label
    return f"{prefix}_{name}.{_ENDINGS[ending]}"


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensors of a LoRA file by expert; {None: all} if the file has no parts for experts.

    Parts are recognised by the names of further networks in pipelines of diffusers. An alpha for all modules
    goes into each part.
    """
    names = list(names)
    starts = {
        name: next(
            (start for rest, _ in _without_starts(name) for start in _BOTH_FURTHER if rest.startswith(start)),
            "",
        )
        for name in names
    }
    if not any(starts.values()):
        return {None: names}
    found: dict[str | None, list[str]] = {}
    of_all = [name for name in names if name in FOR_ALL]
    for name, start in starts.items():
        if name in FOR_ALL:
            continue
        expert = _BOTH_FURTHER[start] if start else NETWORKS[layouts.IN_DIFFUSERS]
        found.setdefault(expert, [*of_all]).append(name)
    return found


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    return next(
        ((kind, key) for key in keys for kind, endings in _OTHER_KINDS.items() if key.endswith(endings)), None
    )


def module_of_tensor(name: str) -> tuple[str, str]:
    """Split a tensor's name: `model.diffusion_model.blocks.0.ffn.0.weight` -> (`blocks_0_ffn_0`, `weight`).

    A parameter that is no module's weight or bias counts as a module, as in LoRA files:
    `blocks.0.modulation` -> (`blocks_0_modulation`, `weight`).
    """
    path, _, leaf = name.rpartition(".")
    if leaf not in _LEAVES:
        path, leaf = name, "weight"
    for prefix in ("model.diffusion_model.", "model.model.", OTHER, "transformer.", "module.", "_orig_mod."):
        path = path.removeprefix(prefix)
    return path.replace(".", "_"), leaf


class _Place(NamedTuple):
    """The parts of the name of a tensor of a LoRA for a DiT."""

    path: str  # of the module as the file writes it, without prefixes: `blocks.0.attn1.to_q`
    whole: str  # the same with its prefixes
    part: str  # our name of the part: `lora_down.weight`
    dialect: str


def _split(key: str) -> _Place | None:
    """Split a key into its parts; None if it does not belong to a LoRA for a DiT."""
    layers = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    key = _PROCESSOR.sub(lambda found: f".{layers[found['layer']]}.lora_{found['factor']}.weight", key)
    # with our names of factors, without what PEFT and diffusers write into them
    key = _our_factor(
        f"{key.removesuffix(_MODULATION)}.modulation.diff" if key.endswith(_MODULATION) else key
    )
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), None)
    if ending is None or _text_place(key) is not None:
        return None
    whole = key.removesuffix(ending)
    path, dialect = _bare(whole)
    return _Place(path, whole, _ENDINGS[ending], dialect)


def _our_factor(key: str) -> str:
    """Rename factors to ours: `x.lora_A.default.weight` -> `x.lora_down.weight`; drop names of adapters."""
    found = _FACTOR.search(key)
    if found is None:
        return _OF_ADAPTER.sub("", key)
    is_down = found["factor"] in ("A", "a", "down")
    return f"{key[: found.start()]}.{LORA[0 if is_down else 1].partition('.')[0]}{found['leaf'] or '.weight'}"


def _without_starts(path: str) -> list[tuple[str, str]]:
    """Return (path, dialect) with 0, 1, 2 ... known prefixes removed; the first tells the dialect."""
    special = next((dialect for start, dialect in _SPECIAL.items() if path.startswith(start)), "")
    path = _WRAPPERS.sub("", path).rstrip("_.")
    found = [(path, special)]
    starts = _STARTS if "." in path and not path.startswith(_OF_TOOLS) else _ALL_STARTS
    while start := next((one for one in starts if path.startswith(one)), ""):
        path = path.removeprefix(start).lstrip("_")
        found.append((path, found[-1][1] or _ALL_STARTS[start]))
    return found


def bare_path(path: str) -> str:
    return _bare(path)[0]


def _bare(path: str) -> tuple[str, str]:
    """Return a module's path without prefixes, and the dialect.

    Prefixes are removed one by one until a known family has a module of that path, or else of that
    underscored name; if none has, all are removed.
    """
    found = _without_starts(path)
    known = next((one for one in found if is_name(one[0], dotted=True)), None)
    known = known or next((one for one in found if is_name(one[0].replace(".", "_"))), None)
    rest, dialect = known or found[-1]
    return rest, dialect or "without prefix"


def _unknown_names(paths: Sequence[str]) -> str:
    """Describe what precedes or follows the path of a known module, else the start of all names."""
    for path in paths:
        pieces = re.split(r"(?<=[._])", path)
        for count in range(1, len(pieces)):
            if is_name("".join(pieces[count:]).replace(".", "_")):
                return f"begin with {''.join(pieces[:count])}"
        begin, dot, end = path.rpartition(".")
        if dot and is_name(bare_path(begin).replace(".", "_")):
            return f"have .{end} behind the module's"
    common = os.path.commonprefix(paths)
    return (
        f"begin with {common[: max(common.rfind('.'), common.rfind('_')) + 1] or paths[0].partition('.')[0]}"
    )


def dialect_in_words(dialect: str) -> str:
    """Describe a dialect by the program that uses it: `names as in ComfyUI`."""
    return "names as in " + " + ".join(_IN_WORDS.get(each, each) for each in dialect.split(" + "))


def families_of(modules: Mapping[str, Factors], hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA's modules, under our names, may be for, as `likely_families`."""
    own = {name.removeprefix(OURS): one for name, one in modules.items() if name.startswith(OURS)}
    return likely_families(own, lambda name: _size_of(own[name]), hint)


def can_be_for(family: FamilyNames, modules: Mapping[str, Factors]) -> bool:
    """Return whether the sizes of a LoRA's modules, under our names, are possible in the family."""
    own = {name.removeprefix(OURS): one for name, one in modules.items() if name.startswith(OURS)}
    return sizes_fit(family, own, lambda name: _size_of(own[name]))


def _size_of(factors: Factors) -> tuple[int, int] | None:
    """Return rows and columns of a weight's change; None if there is none, or if factors are damaged.

    Computed from shapes, because the first operation on the meta device takes seconds.
    """
    shapes = {part: tuple(one.shape) for part, one in factors.items()}
    try:
        if ROWS in factors:
            whole = size_of(factors)
            return None if whole is None else (height_of(factors) or 0, whole[1])
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
    """Return the family whose released models have the text width of these cross-attention factors."""
    sizes = [_size_of(one) for name, one in modules.items() if name.endswith(("attn2_to_k", "attn2_to_v"))]
    widths = {size[1] for size in sizes if size is not None}
    unets = [one for one in FAMILIES if one.start == layouts.UNET_IN_DIFFUSERS]
    return next((one for one in unets if {width for width, _ in one.released} == widths), None)
