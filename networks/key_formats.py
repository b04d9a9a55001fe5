"""Rename the tensors of a LoRA file in any dialect (key format) to ours, and recognize the family.

`tensor_names.py` has the dialects; `rewriting.py` converts factors that differ in more than names.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from networks.delta import Delta, read_delta, read_deltas
from networks.deltas import PARTS, ROWS, SET
from networks.kinds import KINDS
from networks.kinds.algebra import MismatchError
from networks.kinds.composing import FLAT
from networks.kinds.factors import Factors
from networks.module_names import FAMILIES, alias, have_same_names, likely_families, module_path, sizes_fit
from networks.names.layouts import IN_COMFYUI, IN_DIFFUSERS, OURS, UNET_IN_DIFFUSERS, FamilyNames
from networks.rewriting import FOR_ALL, MARKS, Rewritten, rewrite
from networks.tensor_names import (
    IN_OUR_NAMES,
    Place,
    TextPlace,
    describe_unknown,
    find_networks,
    further_expert,
    name_text,
    split_key,
    split_text,
)

_FAMILY_OF_DIALECT = {"HunyuanVideo-I2V": "hunyuan_video"}
_LEAVES = ("weight", "bias")
# prefixes of tensor names in model files, removed in this order
_OF_MODELS = (
    *("model.diffusion_model.", "model.model.", IN_COMFYUI, IN_DIFFUSERS, "module.", "_orig_mod.", "net."),
)
# kinds of networks that are not supported -> endings of their tensor names
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
    text_encoder: tuple[str, ...]  # keys for a text encoder that are ignored or have no name of ours
    texts: Mapping[str, Tensor]  # for text encoders, such as `lora_te1_text_model_....lora_down.weight`
    unknown: tuple[str, ...]  # keys that do not belong to a LoRA
    repeated: Mapping[str, str]  # second key of a part -> the first one
    clash: tuple[str, str] | None  # two keys of one part with different values
    # our module -> its path as the file writes it, without the prefix: `blocks.0.attn1.to_q`
    paths: Mapping[str, str]
    stacked: Mapping[str, int]  # our module -> number of LoRAs that were joined into its factors
    families: tuple[FamilyNames, ...]  # possible families by names and sizes
    family_name: str | None  # family revealed by the form of the names; None if the form reveals none
    unknown_names: str  # description of the names if no family has them; else ""

    @property
    def family(self) -> FamilyNames | None:
        """Return the family; None if unknown, or if several with different module names are possible."""
        return self.families[0] if self.families and have_same_names(self.families) else None


class _Places(NamedTuple):
    """The parsed keys of a file, by key, and the keys that do not belong to a LoRA."""

    in_dit: dict[str, Place]
    in_texts: dict[str, TextPlace]
    unknown: list[str]


def to_native(
    tensors: Mapping[str, Tensor], family_hint: str | None = None, with_texts: bool = True
) -> NativeTensors:
    """Rename the tensors of any dialect to ours.

    Values are unchanged, except that `rewrite` joins some and that magnitudes become columns. Missing alphas
    are not added.

    Args:
        tensors: Tensors by name.
        family_hint: Family that the user or the metadata names.
        with_texts: Whether to rename tensors of text encoders too.
    """
    internal = tuple(key for key in tensors if ROWS in key)  # our own mark, which files must not contain
    rearranged = Rewritten({key: tensor for key, tensor in tensors.items() if key not in internal}, {})
    if any(MARKS.search(key) for key in rearranged.tensors):
        rearranged = rewrite(rearranged.tensors)

    places = _place_keys(rearranged.tensors)
    dialects = sorted({place.dialect for place in places.in_dit.values()})
    named_by_dialect = [_FAMILY_OF_DIALECT[dialect] for dialect in dialects if dialect in _FAMILY_OF_DIALECT]
    family_name = rearranged.family_name or next(iter(named_by_dialect), None)
    hint = family_hint or family_name
    families = _families_of_places(places.in_dit, rearranged.tensors, hint)
    if len(families) > 1:
        families = _families_by_form(families, places)
        if len(families) == 1:
            family_name = families[0].name

    modules = _our_modules(places.in_dit, families)
    names = {key: f"{modules[place.path]}.{place.part}" for key, place in places.in_dit.items()}
    text_names: dict[str, str] = {}
    if with_texts:
        text_names = _name_texts(places.in_texts, _find_family_for_texts(places.in_texts, families, hint))

    first_keys: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for key, name in (names | text_names).items():
        if first_keys.setdefault(name, key) != key:
            repeated[key] = first_keys[name]
    return NativeTensors(
        tensors=_rename(names, first_keys, rearranged.tensors),
        dialect=" + ".join(dialects),
        text_encoder=tuple(key for key in places.in_texts if key not in text_names),
        texts=_rename(text_names, first_keys, rearranged.tensors),
        unknown=(*places.unknown, *internal),
        repeated=repeated,
        clash=_find_clash(repeated, rearranged.tensors),
        paths={modules[place.path]: place.path for place in places.in_dit.values()},
        stacked={
            names[key].partition(".")[0]: count for key, count in rearranged.stacked.items() if key in names
        },
        families=tuple(families),
        family_name=family_name,
        unknown_names="" if families else describe_unknown(p.full_path for p in places.in_dit.values()),
    )


def read_own_names(tensors: Mapping[str, Tensor], family: FamilyNames) -> NativeTensors | None:
    """Return the tensors of a file that we wrote under our names; None if a key is not one of our names.

    Args:
        tensors: Tensors by name.
        family: Family that the metadata name.
    """
    paths: dict[str, str] = {}
    for key in tensors:
        module, _, part = key.partition(".")
        path = module.removeprefix(OURS)
        if path == module or part not in PARTS or FLAT.search(key) or module_path(path, family) is None:
            return None
        paths[module] = path
    return NativeTensors(
        tensors=dict(tensors),
        dialect=IN_OUR_NAMES,
        text_encoder=(),
        texts={},
        unknown=(),
        repeated={},
        clash=None,
        paths=paths,
        stacked={},
        families=(family,),
        family_name=None,
        unknown_names="",
    )


def _place_keys(keys: Iterable[str]) -> _Places:
    """Parse the keys of a file."""
    places = _Places({}, {}, [])
    for key in keys:
        text_place = split_text(key)
        place = None if text_place is not None else split_key(key)
        if text_place is not None:
            places.in_texts[key] = text_place
        elif place is not None:
            places.in_dit[key] = place
        elif key not in FOR_ALL:
            places.unknown.append(key)
    return places


def _families_of_places(
    places: Mapping[str, Place], tensors: Mapping[str, Tensor], hint: str | None
) -> list[FamilyNames]:
    """Return the families that have modules of these names and sizes."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, place in places.items():
        module = OURS + place.path.replace(".", "_")
        factors.setdefault(module, {})[place.part] = tensors[key]
    return families_of(factors, hint) if factors else []


def _families_by_form(families: Sequence[FamilyNames], places: _Places) -> list[FamilyNames]:
    """Narrow the possible families down by the form of the names and by the number of text encoders.

    Underscored aliases (`lora_unet_input_blocks_...`) occur only in files of families that use aliases, and a
    second text encoder (`lora_te2_...`) only with families that have two. If no family is left, all are
    returned.
    """
    num_encoders = max((place.number for place in places.in_texts.values()), default=1)
    by_texts: list[FamilyNames] = []
    for family in families:
        # prefixes may skip a number: FLUX.1 has lora_te1 and lora_te3
        has_prefix = any(start.endswith(str(num_encoders)) for start, _ in family.encoders)
        if has_prefix or len(family.encoders) >= num_encoders:
            by_texts.append(family)
    by_texts = by_texts or [*families]
    underscored = {place.path for place in places.in_dit.values() if "." not in place.path}
    if not underscored:
        return by_texts
    by_aliases: list[FamilyNames] = []
    for family in by_texts:
        has_aliases = any(alias(path, family) != path for path in underscored)
        if not has_aliases or family.always_underscored == "aliases":
            by_aliases.append(family)
    return by_aliases or by_texts


def _our_modules(places: Mapping[str, Place], families: Sequence[FamilyNames]) -> dict[str, str]:
    """Return path -> our module name; an alias is translated only if all families agree."""
    modules: dict[str, str] = {}
    for path in dict.fromkeys(place.path for place in places.values()):
        module = path.replace(".", "_")
        aliases = {alias(module, family) for family in families}
        modules[path] = OURS + (aliases.pop() if len(aliases) == 1 else module)
    return modules


def _find_family_for_texts(
    places: Mapping[str, TextPlace], families: Sequence[FamilyNames], hint: str | None
) -> FamilyNames | None:
    """Return the family whose text encoders a file changes; None if it is ambiguous.

    It is ambiguous if the possible families have different text encoders; the encoders then keep their names
    from the file.

    Args:
        places: Parsed keys of text encoders.
        families: Possible families by the names of the DiT's modules.
        hint: Family that the user or the metadata names.
    """
    maximum = max((place.number for place in places.values()), default=1)
    likely = [family for family in families if len(family.encoders) >= maximum] or families[:1]
    if likely:
        return likely[0] if len({family.encoders for family in likely}) == 1 else None
    return next((family for family in FAMILIES if family.name == hint), None)


def _name_texts(places: Mapping[str, TextPlace], family: FamilyNames | None) -> dict[str, str]:
    """Map keys of text encoders to our names; keys without a name of ours are left out."""
    names: dict[str, str] = {}
    for key, place in places.items():
        name = name_text(place, family)
        if name is not None:
            names[key] = name
    return names


def _rename(
    names: Mapping[str, str], first_keys: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors under our names; modules without an alpha get the file's common alpha.

    Magnitudes that a file stores as vectors become columns.

    Args:
        names: Our name of each key.
        first_keys: Our name -> the first key in the file with this meaning.
        tensors: Tensors of the whole file, by key.
    """
    modules = dict.fromkeys(name.partition(".")[0] for name in names.values())
    renamed = {f"{module}.alpha": tensors[key] for key in FOR_ALL if key in tensors for module in modules}
    for name in names.values():
        key = first_keys[name]
        tensor = tensors[key]
        if FLAT.search(key):  # a vector of magnitudes becomes a column
            inner_axes = max(tensor.ndim - 1, 1)
            tensor = tensor.reshape(-1, *[1] * inner_axes)
        renamed[name] = tensor
    return renamed


def _find_clash(repeated: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return two keys with the same meaning but different values; None if there are none.

    `repeated` maps each repeated key to the first key with the same meaning.
    """
    for key, first_key in repeated.items():
        first = tensors[first_key]
        second = tensors[key]
        if first.shape != second.shape or not first.float().equal(second.float()):
            return first_key, key
    return None


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensors of a LoRA file by expert; {None: all} if the file has no parts for experts.

    Experts are recognized by the prefixes of additional networks in diffusers pipelines, such as
    `transformer_2`. An alpha that applies to all modules is copied to each expert.
    """
    names = list(names)
    experts = {name: further_expert(name) for name in names}
    if not any(experts.values()):
        return {None: names}
    by_expert: dict[str | None, list[str]] = {}
    alpha_names = [name for name in names if name in FOR_ALL]
    for name, expert in experts.items():
        if name not in FOR_ALL:
            by_expert.setdefault(expert or find_networks()[IN_DIFFUSERS], [*alpha_names]).append(name)
    return by_expert


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return an unsupported kind of network and a key that reveals it; None if all keys may be supported."""
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
    for prefix in _OF_MODELS:
        path = path.removeprefix(prefix)
    return path.replace(".", "_"), leaf


def families_of(modules: Mapping[str, Factors], hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA may be for, judged by our names of its modules and their sizes."""
    in_dit = _read_deltas_of_dit(modules)
    return likely_families(in_dit, lambda name: _size_of(in_dit[name]), hint)


def can_be_for(family: FamilyNames, modules: Mapping[str, Factors]) -> bool:
    """Return whether the sizes of a LoRA's modules, under our names, are possible in the family."""
    in_dit = _read_deltas_of_dit(modules)
    return sizes_fit(family, in_dit, lambda name: _size_of(in_dit[name]))


def _read_deltas_of_dit(modules: Mapping[str, Factors]) -> dict[str, Delta]:
    """Return the modules with our prefix for a DiT, without the prefix."""
    in_dit = {name.removeprefix(OURS): factors for name, factors in modules.items() if name.startswith(OURS)}
    return read_deltas(in_dit)


def _size_of(delta: Delta) -> tuple[int, int] | None:
    """Return rows and columns of a weight's change; None without such a change or for damaged factors."""
    if delta.is_part:
        size = delta.size()
        return None if size is None else (delta.height() or 0, size[1])
    full = delta.factors.get("diff", delta.factors.get(SET))
    try:
        shape = delta.shape() if full is None else tuple(full.shape)
    except MismatchError:  # damaged files need a family too, for their messages
        return None
    if not shape or 0 in shape:
        return None
    return shape[0], math.prod(shape[1:])


def family_by_text_width(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the family whose released models have the text width of these cross-attention factors."""
    widths: set[int] = set()
    for name, factors in modules.items():
        size = _size_of(read_delta(factors)) if name.endswith(("attn2_to_k", "attn2_to_v")) else None
        if size is not None:
            widths.add(size[1])
    unets = [family for family in FAMILIES if family.start == UNET_IN_DIFFUSERS]
    for unet in unets:
        if {width for width, _ in unet.released} == widths:
            return unet
    return None
