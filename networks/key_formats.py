"""Dialects of tensor names in LoRA files: recognise them, and rename to ours.

ours        lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight   .alpha
other       diffusion_model.blocks.0.self_attn.q.lora_A.weight   .lora_B.weight   (ComfyUI; alpha is optional)
diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, base_model.model. ... (PEFT; .lora.down / .lora.up)
LyCORIS     lycoris_blocks_0_self_attn_q.hada_w1_a ...
LTX-2       lora_unet_model_transformer_blocks_0_attn1_to_q.lora_down.weight (musubi-tuner's fork)
VideoX-Fun  lora_unet__blocks_0_self_attn_q.lora_down.weight
DiffSynth   pipe.dit.blocks.0.self_attn.q.lora_A.default.weight
            blocks.0.attn.qkv_proj.lora_B.default.weight (MiniMax-H3, with the rows by head)
ComfyUI     also diffusion_model.blocks.0.norm3.set_weight, which takes the place of the model's weight
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

from networks.deltas import DOWN, LORA, PARTS, ROWS, SET, UP, Factors, height_of, size_of
from networks.kinds import KINDS
from networks.kinds.composing import ENDS, is_flat, kinds_in, usual_key
from networks.kinds.contract import Extent, Shapes
from networks.module_names import FAMILIES, alias, have_same_names, is_name, likely_families, sizes_fit
from networks.names import layouts
from networks.names.layouts import OF_CLIP, OF_LANGUAGE_MODEL, OF_LTX_FORK, OF_T5, OURS, FamilyNames
from networks.names.texts import TEXT_PROJECTION
from networks.rewriting import FOR_ALL, MARKS, Rewritten, rewrite

OTHER = "diffusion_model."
# the experts' networks in pipelines of diffusers, which are also prefixes of tensor names
NETWORKS = {f"{network}.": expert for family in FAMILIES for network, expert in family.experts}
# the same, with other prefixes in files that hold several experts
EXPERT_STARTS = NETWORKS | {f"{name}.": expert for family in FAMILIES for name, expert in family.more_experts}
# of networks in pipelines of diffusers with the same modules
_MORE_STARTS = tuple(start for family in FAMILIES for start in family.more_starts)
_FURTHER = tuple(start for start in EXPERT_STARTS if start != layouts.IN_DIFFUSERS)
# prefixes of names -> their dialect, if they show it. They are removed, in any order, until none fits; in
# names without dots they have "_" for "."
_STARTS = {
    OURS: "ours",
    **{start: dialect for kind in KINDS for start, dialect in kind.starts.items()},
    "lycoris_": "LyCORIS",
    "lora_transformer_": "OneTrainer",
    "lora_transformer-": "InvokeAI",
    "Hunyuan_video_I2V_lora_": "HunyuanVideo-I2V",
    "base_model.model.": "PEFT",
    OTHER: "other",
    "pipe.": "DiffSynth",
    **dict.fromkeys((*_MORE_STARTS, *EXPERT_STARTS), "diffusers"),
    layouts.UNET_IN_DIFFUSERS: "diffusers",
    **dict.fromkeys(("base_model.", "model.", "module.", "dit.", "net.", "denoiser."), ""),
}
_BOTH_FURTHER = {
    form: EXPERT_STARTS[start] for start in _FURTHER for form in (start, start.replace(".", "_"))
}
_ALL_STARTS = {**_STARTS, **{start.replace(".", "_"): dialect for start, dialect in _STARTS.items()}}
# of names with dots alone; underscored, the first one is ours
_DOTTED_STARTS = {**_STARTS, **dict.fromkeys(("lora_unet.", "lora_transformer."), "OneTrainer")}
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
_OF_CLIP_ALONE = ("encoder_layers_", "embeddings_", "final_layer_norm")
_BARE_TEXTS = ("text_model.encoder.", "encoder.block.")
_OF_ALL = (*FamilyNames.encoders, ("lora_te2", OF_CLIP), ("lora_te", OF_LANGUAGE_MODEL))  # of no known family
_ENDINGS = {
    **ENDS,
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
# diffusers before PEFT: factors of the attention, not of its layers
_PROCESSOR = re.compile(r"(\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<factor>down|up)\.weight$")
_LEAVES = ("weight", "bias")
_MODULATION = ".diff_m"  # LightX2V: of `modulation` in a block or in the head, whose path stands before
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)

# endings of other kinds of networks, whose change is not a sum of matrices to add to a weight
_OTHER_KINDS = {
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    **{form: endings for kind in KINDS for form, endings in kind.unread.items()},
    "BOFT": (".boft_R", ".boft_s"),
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
    families: tuple[FamilyNames, ...]  # that names and sizes allow
    family_name: str | None  # the only family with names of this form
    unknown_names: str  # description of names that no known family has; else ""

    @property
    def family(self) -> FamilyNames | None:
        """Return the family by the names; None if several are possible whose names mean different things."""
        return self.families[0] if self.families and have_same_names(self.families) else None


def to_native(
    tensors: Mapping[str, Tensor], family_hint: str | None = None, with_texts: bool = True
) -> NativeTensors:
    """Rename the tensors of any dialect to ours.

    Values are unchanged, except that `rewrite` joins some, and magnitudes become columns; missing alphas stay
    missing. with_texts: also rename tensors of text encoders.
    """
    internal = tuple(key for key in tensors if ROWS in key)  # `rewrite` alone may say which rows a part has
    usual = Rewritten({key: tensor for key, tensor in tensors.items() if key not in internal}, {})
    if any(MARKS.search(key) for key in usual.tensors):
        usual = rewrite(usual.tensors)

    tensors = usual.tensors
    places = _place_keys(tensors)
    dialects = sorted({place.dialect for place in places.values()})
    alpha_keys = [key for key in FOR_ALL if key in tensors]
    unplaced = [key for key in tensors if key not in places and key not in alpha_keys]
    text_places = _place_texts(unplaced)
    family_name = usual.family_name or _family_of_dialects(dialects)
    hint = family_hint or family_name or None
    families = _families_of_places(places, tensors, hint)
    if len(families) > 1:
        families = _families_by_form(families, places, text_places)
        if len(families) == 1:
            family_name = families[0].name
    in_dit = _NamedModules(places, _our_modules(places, families))

    text_names: dict[str, str] = {}
    if with_texts:
        text_names = _names_of_texts(text_places, _family_for_texts(text_places, families, hint))

    names = in_dit.names()
    first_keys = _first_keys(names | text_names)
    repeated = _repeated_keys(names | text_names, first_keys)
    alphas = _alphas_for_all(alpha_keys, tensors, in_dit.modules.values())
    return NativeTensors(
        tensors=alphas | _rename(names, first_keys, tensors),
        dialect=" + ".join(dialects),
        text_encoder=tuple(key for key in text_places if key not in text_names),
        texts=_renamed_texts(alpha_keys, text_names, tensors),
        unknown=(*(key for key in unplaced if key not in text_places), *internal),
        repeated=repeated,
        clash=_find_clash(repeated, tensors),
        paths=in_dit.paths(),
        stacked=in_dit.counts(usual.stacked),
        families=tuple(families),
        family_name=family_name or None,
        unknown_names="" if families else _unknown_names(places),
    )


class _NamedModules(NamedTuple):
    """The modules of a LoRA for a DiT."""

    places: Mapping[str, "_Place"]  # by key
    modules: Mapping[str, str]  # path as the file writes it -> our name

    def names(self) -> dict[str, str]:
        """Return our name of each key."""
        return {key: f"{self.modules[place.path]}.{place.part}" for key, place in self.places.items()}

    def paths(self) -> dict[str, str]:
        """Return the path of each module of ours."""
        return {self.modules[place.path]: place.path for place in self.places.values()}

    def counts(self, by_key: Mapping[str, int]) -> dict[str, int]:
        """Turn numbers by key into numbers by our modules."""
        counts: dict[str, int] = {}
        for key, count in by_key.items():
            if key in self.places:
                counts[self.modules[self.places[key].path]] = count
        return counts


def _place_keys(keys: Iterable[str]) -> dict[str, "_Place"]:
    """Return the parts of the name of each key that belongs to a LoRA for a DiT."""
    places: dict[str, _Place] = {}
    for key in keys:
        place = _split(key)
        if place is not None:
            places[key] = place
    return places


def _family_of_dialects(dialects: Iterable[str]) -> str:
    """Return the name of the only family that has files in one of these dialects; "" if there is none."""
    names = (_FAMILY_OF_DIALECT.get(dialect, "") for dialect in dialects)
    return next(filter(None, names), "")


def _families_of_places(
    places: Mapping[str, "_Place"], tensors: Mapping[str, Tensor], hint: str | None
) -> list[FamilyNames]:
    """Return the families that modules of these names and sizes may be for."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, place in places.items():
        module = OURS + place.path.replace(".", "_")
        factors.setdefault(module, {})[place.part] = tensors[key]
    return families_of(factors, hint) if factors else []


def _families_by_form(
    families: Sequence[FamilyNames], places: Mapping[str, "_Place"], texts: Mapping[str, "_TextPlace"]
) -> list[FamilyNames]:
    """Return those of several families whose files have names of this form, and as many text encoders.

    Underscored names that are aliases (`lora_unet_input_blocks_...`) are of families whose files are named
    so; a second text encoder (`lora_te2_...`) is of those with a prefix of that number. All families if none
    is left.
    """
    most = max((place.number for place in texts.values()), default=1)
    by_texts = [family for family in families if _has_encoder(family, most)] or [*families]
    underscored = {place.path for place in places.values() if "." not in place.path}
    if not underscored:
        return by_texts
    by_aliases: list[FamilyNames] = []
    for family in by_texts:
        has_aliases = any(alias(path, family) != path for path in underscored)
        if not has_aliases or family.always_underscored == "aliases":
            by_aliases.append(family)
    return by_aliases or by_texts


def _has_encoder(family: FamilyNames, number: int) -> bool:
    """Return whether a family has as many text encoders, or one whose prefix has this number."""
    return len(family.encoders) >= number or any(start.endswith(str(number)) for start, _ in family.encoders)


def _our_modules(places: Mapping[str, "_Place"], families: Sequence[FamilyNames]) -> dict[str, str]:
    """Return our name of the module at each path: an alias if all families have the same one."""
    modules: dict[str, str] = {}
    for place in places.values():
        if place.path in modules:
            continue
        module = place.path.replace(".", "_")
        aliases = {alias(module, family) for family in families}
        modules[place.path] = OURS + (aliases.pop() if len(aliases) == 1 else module)
    return modules


def _first_keys(names: Mapping[str, str]) -> dict[str, str]:
    """Return the first key of each of our names. names: key -> our name."""
    first_keys: dict[str, str] = {}
    for key, name in names.items():
        first_keys.setdefault(name, key)
    return first_keys


def _repeated_keys(names: Mapping[str, str], first_keys: Mapping[str, str]) -> dict[str, str]:
    """Return the keys whose name an earlier key has too: key -> the first key of that name."""
    return {key: first_keys[name] for key, name in names.items() if first_keys[name] != key}


def _rename(
    names: Mapping[str, str], first_keys: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors for a DiT under our names, magnitudes as columns."""
    native: dict[str, Tensor] = {}
    for name in names.values():
        key = first_keys[name]
        native[name] = _with_columns(key, tensors[key])
    return native


def _with_columns(key: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file, magnitudes as columns."""
    if not is_flat(key):
        return tensor
    inner_axes = max(tensor.ndim - 1, 1)
    return tensor.reshape(-1, *[1] * inner_axes)


def _alphas_for_all(
    alpha_keys: Iterable[str], tensors: Mapping[str, Tensor], modules: Iterable[str]
) -> dict[str, Tensor]:
    """Return the alpha that a file has for all of its modules, for each of them."""
    modules = list(modules)
    return {f"{module}.alpha": tensors[key] for key in alpha_keys for module in modules}


def _place_texts(keys: Iterable[str]) -> dict[str, "_TextPlace"]:
    """Return the parts of the name of each key that belongs to a text encoder."""
    places: dict[str, _TextPlace] = {}
    for key in keys:
        place = _text_place(key)
        if place is not None:
            places[key] = place
    return places


def _family_for_texts(
    places: Mapping[str, "_TextPlace"], families: Sequence[FamilyNames], hint: str | None
) -> FamilyNames | None:
    """Return the family whose text encoders a file changes.

    families: by the names of modules of the DiT. None if several are possible whose text encoders have
    different names: encoders are then called as in the file.
    """
    most = max((place.number for place in places.values()), default=1)
    likely = [family for family in families if len(family.encoders) >= most] or families[:1]
    if likely:
        return likely[0] if len({family.encoders for family in likely}) == 1 else None
    return next((family for family in FAMILIES if family.name == hint), None)


def _names_of_texts(places: Mapping[str, "_TextPlace"], family: FamilyNames | None) -> dict[str, str]:
    """Return our name of each key of a text encoder that has one."""
    names: dict[str, str] = {}
    for key, place in places.items():
        name = _name_of_text(place, family)
        if name is not None:
            names[key] = name
    return names


def _renamed_texts(
    alpha_keys: Iterable[str], names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of text encoders under our names, with the alpha that a file has for all modules."""
    texts = {name: _with_columns(key, tensors[key]) for key, name in names.items()}
    modules = [name.partition(".")[0] for name in texts]
    return _alphas_for_all(alpha_keys, tensors, modules) | texts


def _find_clash(repeated: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return two keys of one part with different values, the first one first."""
    for key, first_key in repeated.items():
        if _differ(tensors[key], tensors[first_key]):
            return first_key, key
    return None


def _differ(first: Tensor, second: Tensor) -> bool:
    return first.shape != second.shape or not first.float().equal(second.float())


class _TextPlace(NamedTuple):
    """The parts of the name of a tensor of a text encoder's LoRA."""

    start: str  # prefix that shows the encoder
    number: int  # of the encoder, from 1
    path: str  # what follows


def _text_place(key: str) -> _TextPlace | None:
    """Split a text encoder's name; None for other names."""
    for bare in _without_starts(key):
        match = _TEXT.match(bare.path)
        if match is not None:
            number = int(match["ours"] or match["short"] or match["pipeline"] or 1)
            is_second = "clip_g" in (match["comfy"], match["alone"]) or match["ldm"] == "1"
            start = bare.path[: match.end()]
            path = bare.path[match.end() :]
            return _TextPlace(start, 2 if is_second else number, path)
        if bare.path.startswith(_BARE_TEXTS):
            return _TextPlace("", 1, bare.path)
    return None


def _name_of_text(place: _TextPlace, family: FamilyNames | None) -> str | None:
    """Return our name for a tensor of a text encoder's LoRA: `lora_te1_text_model_...`; None if unknown.

    The layers identify the encoder, whatever number a program gives it.
    """
    path = _our_factor(_PROCESSOR.sub(r".\g<layer>_proj.lora_\g<factor>.weight", place.path))
    ending = _ending_of(path)
    if ending is None:
        return None
    path = _WRAPPERS.sub("", path.removesuffix(ending)).rstrip("_")
    kind, name = _text_layer(_text_paths(path))
    prefix = _text_prefix(place, kind, family)
    return None if prefix is None else f"{prefix}_{name}.{_ENDINGS[ending]}"


def _ending_of(key: str) -> str | None:
    """Return the longest known ending of a key; None if it has none."""
    return next((ending for ending in _BY_LENGTH if key.endswith(ending)), None)


def _text_paths(path: str) -> list[str]:
    """Return a path in a text encoder with 0, 1, 2 ... known prefixes removed."""
    paths = [path]
    while True:
        start = next(
            (start for start in _TEXT_STARTS if path.startswith((start, start.replace(".", "_")))), ""
        )
        if not start:
            return paths
        path = path[len(start) :]
        paths.append(path)


def _text_layer(paths: Iterable[str]) -> tuple[str, str]:
    """Return the kind of encoder ("" if unknown) and the underscored name of the layer.

    paths: of one layer, with ever fewer prefixes.
    """
    names: list[str] = []
    for path in paths:
        name = path.replace(".", "_")
        # CLIP, as transformers 5 and later has it
        names.append(OF_CLIP + name if name.startswith(_OF_CLIP_ALONE) else name)
    for name in names:
        if name.removeprefix(OF_CLIP) == TEXT_PROJECTION:
            return OF_CLIP, TEXT_PROJECTION
        for kind in (OF_CLIP, OF_T5, OF_LANGUAGE_MODEL):
            if name.startswith(kind):
                return kind, name
    return "", names[0]


def _text_prefix(place: _TextPlace, kind: str, family: FamilyNames | None) -> str | None:
    """Return our prefix of an encoder; None if its name is that of another kind of encoder."""
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
        return None  # another encoder than that of this name
    return label


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensors of a LoRA file by expert; {None: all} if the file has no parts for experts.

    Parts are recognised by the names of further networks in pipelines of diffusers. An alpha for all modules
    goes into each part.
    """
    names = list(names)
    starts = {name: _further_start(name) for name in names}
    if not any(starts.values()):
        return {None: names}
    by_expert: dict[str | None, list[str]] = {}
    alpha_names = [name for name in names if name in FOR_ALL]
    for name, start in starts.items():
        if name in FOR_ALL:
            continue
        expert = _BOTH_FURTHER[start] if start else NETWORKS[layouts.IN_DIFFUSERS]
        by_expert.setdefault(expert, [*alpha_names]).append(name)
    return by_expert


def _further_start(name: str) -> str:
    """Return the prefix by which a name belongs to a further network of a pipeline; "" if it has none."""
    for bare in _without_starts(name):
        for start in _BOTH_FURTHER:
            if bare.path.startswith(start):
                return start
    return ""


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Find a key of a kind of network that is not supported; return the kind and the key."""
    for key in keys:
        for kind, endings in _OTHER_KINDS.items():
            if key.endswith(endings):
                return kind, key
    return None


def module_of_tensor(name: str) -> tuple[str, str]:
    """Split a tensor's name: `model.diffusion_model.blocks.0.ffn.0.weight` -> (`blocks_0_ffn_0`, `weight`).

    A parameter that is not a module's weight or bias counts as a module, as in LoRA files:
    `blocks.0.modulation` -> (`blocks_0_modulation`, `weight`).
    """
    path, _, leaf = name.rpartition(".")
    if leaf not in _LEAVES:
        path = name
        leaf = "weight"
    for prefix in ("model.diffusion_model.", "model.model.", OTHER, "transformer.", "module.", "_orig_mod."):
        path = path.removeprefix(prefix)
    return path.replace(".", "_"), leaf


class _Place(NamedTuple):
    """The parts of the name of a tensor of a LoRA for a DiT."""

    path: str  # of the module as the file writes it, without prefixes: `blocks.0.attn1.to_q`
    full_path: str  # the same with its prefixes
    part: str  # our name of the part: `lora_down.weight`
    dialect: str


def _split(key: str) -> _Place | None:
    """Split a key into its parts; None if it does not belong to a LoRA for a DiT."""
    layers = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    key = _PROCESSOR.sub(lambda match: f".{layers[match['layer']]}.lora_{match['factor']}.weight", key)
    if key.endswith(_MODULATION):
        key = f"{key.removesuffix(_MODULATION)}.modulation.diff"
    key = _our_factor(key)  # without what PEFT and diffusers write into the names of factors
    ending = _ending_of(key)
    if ending is None or _text_place(key) is not None:
        return None
    full_path = key.removesuffix(ending)
    bare = _bare(full_path)
    return _Place(bare.path, full_path, _ENDINGS[ending], bare.dialect)


def _our_factor(key: str) -> str:
    """Rename factors to ours: `x.lora_A.default.weight` -> `x.lora_down.weight`; drop names of adapters."""
    match = _FACTOR.search(key)
    if match is None:
        return usual_key(key)
    is_down = match["factor"] in ("A", "a", "down")
    factor = LORA[0 if is_down else 1].partition(".")[0]
    return f"{key[: match.start()]}.{factor}{match['leaf'] or '.weight'}"


class _Bare(NamedTuple):
    """A path without some of its prefixes, and the dialect that they show."""

    path: str
    dialect: str


def _without_starts(path: str) -> list[_Bare]:
    """Return the path with 0, 1, 2 ... known prefixes removed; the first prefix shows the dialect."""
    special = next((dialect for start, dialect in _SPECIAL.items() if path.startswith(start)), "")
    path = _WRAPPERS.sub("", path).rstrip("_.")
    stages = [_Bare(path, special)]
    starts = _DOTTED_STARTS if "." in path and not path.startswith(_OF_TOOLS) else _ALL_STARTS
    while True:
        start = next((start for start in starts if path.startswith(start)), "")
        if not start:
            return stages
        path = path.removeprefix(start).lstrip("_")
        stages.append(_Bare(path, stages[-1].dialect or starts[start]))


def bare_path(path: str) -> str:
    """Return a module's path without prefixes."""
    return _bare(path).path


def _bare(path: str) -> _Bare:
    """Return a module's path without prefixes, and the dialect.

    Prefixes are removed one by one until a known family has a module of that path, or else of that
    underscored name; if none has, all are removed.
    """
    stages = _without_starts(path)
    bare = next((stage for stage in stages if is_name(stage.path, dotted=True)), None)
    if bare is None:
        bare = next((stage for stage in stages if is_name(stage.path.replace(".", "_"))), stages[-1])
    return _Bare(bare.path, bare.dialect or "without prefix")


def _unknown_names(places: Mapping[str, _Place]) -> str:
    """Describe what precedes or follows the path of a known module, else the start of all names; "" if there
    are no names.
    """
    if not places:
        return ""
    paths = [place.full_path for place in places.values()]
    for path in paths:
        pieces = re.split(r"(?<=[._])", path)
        for count in range(1, len(pieces)):
            if is_name("".join(pieces[count:]).replace(".", "_")):
                return f"begin with {''.join(pieces[:count])}"
        begin, dot, end = path.rpartition(".")
        if dot and is_name(bare_path(begin).replace(".", "_")):
            return f"have .{end} behind the module's"
    common = os.path.commonprefix(paths)
    last_separator = max(common.rfind("."), common.rfind("_"))
    return f"begin with {common[: last_separator + 1] or paths[0].partition('.')[0]}"


def dialect_in_words(dialect: str) -> str:
    """Describe a dialect by the program that uses it: `names as in ComfyUI`."""
    words = [_IN_WORDS.get(name, name) for name in dialect.split(" + ")]
    return "names as in " + " + ".join(words)


def families_of(modules: Mapping[str, Factors], hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA's modules, under our names, may be for, as `likely_families`."""
    in_dit = _modules_of_dit(modules)
    return likely_families(in_dit, lambda name: _size_of(in_dit[name]), hint)


def can_be_for(family: FamilyNames, modules: Mapping[str, Factors]) -> bool:
    """Return whether the sizes of a LoRA's modules, under our names, are possible in the family."""
    in_dit = _modules_of_dit(modules)
    return sizes_fit(family, in_dit, lambda name: _size_of(in_dit[name]))


def _modules_of_dit(modules: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the modules with our prefix for a DiT, without the prefix."""
    return {name.removeprefix(OURS): factors for name, factors in modules.items() if name.startswith(OURS)}


def _size_of(factors: Factors) -> tuple[int, int] | None:
    """Return rows and columns of a weight's change; None if there is none, or if factors are damaged.

    Computed from shapes, because the first operation on the meta device takes seconds.
    """
    shapes = {part: tuple(tensor.shape) for part, tensor in factors.items()}
    try:
        if ROWS in factors:
            size = size_of(factors)
            return None if size is None else (height_of(factors) or 0, size[1])
        rows, columns = _rows_and_columns(shapes)
    except (KeyError, ValueError, IndexError):  # such files are described too
        return None
    width = math.prod(columns)
    return (rows, width) if rows and columns and width else None


def _rows_and_columns(shapes: Shapes) -> Extent:
    """Return the extent of a weight's change.

    Raises KeyError, ValueError or IndexError if the shapes are not factors of one change.
    """
    whole = shapes.get("diff", shapes.get(SET))
    if whole is not None:
        rows, *columns = whole
        return rows, columns
    if DOWN in shapes and shapes[DOWN][0] != shapes[UP][1]:
        raise ValueError("factors of different ranks")
    for kind in kinds_in(shapes):
        if kind.extent is not None:
            return kind.extent(shapes)
    raise KeyError("no factors of a change")


def family_by_text_width(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the family whose released models have the text width of these cross-attention factors."""
    widths: set[int] = set()
    for name, factors in modules.items():
        size = _size_of(factors) if name.endswith(("attn2_to_k", "attn2_to_v")) else None
        if size is not None:
            widths.add(size[1])
    unets = [family for family in FAMILIES if family.start == layouts.UNET_IN_DIFFUSERS]
    for unet in unets:
        if {width for width, _ in unet.released} == widths:
            return unet
    return None
