"""Rename the tensors of a LoRA file from any dialect (key format) to our names, and recognize the family.

`tensor_names.py` describes the dialects. `rewriting.py` converts tensors that differ in more than their
names.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from networks.delta import Delta, read_delta, read_deltas
from networks.formats import kohya
from networks.formats.diffusers import STORED_AS_VECTOR
from networks.kinds.algebra import MismatchError
from networks.kinds.factors import Factors
from networks.module_factors import FACTOR_NAMES, ROW_RANGE, SET_WEIGHT
from networks.module_names import (
    FAMILIES,
    from_alias,
    have_same_names,
    likely_families,
    module_path,
    sizes_fit,
)
from networks.names.layouts import IN_COMFYUI, IN_DIFFUSERS, OURS, UNET_IN_DIFFUSERS, FamilyNames
from networks.rewriting import GLOBAL_ALPHA_KEYS, NEEDS_REWRITING, Rewritten, rewrite
from networks.tensor_names import (
    IN_OUR_NAMES,
    ParsedKey,
    ParsedTextKey,
    describe_unknown,
    find_networks,
    further_expert,
    name_text,
    split_key,
    split_text,
)

_FAMILY_BY_DIALECT = {"HunyuanVideo-I2V": "hunyuan_video"}
_PARAMETER_NAMES = ("weight", "bias")
# prefixes of tensor names in model files, removed in this order
_MODEL_PREFIXES = (
    "model.diffusion_model.",
    "model.model.",
    IN_COMFYUI,
    IN_DIFFUSERS,
    "module.",
    "_orig_mod.",
    "net.",
)
# kinds of networks that are not supported -> endings of their tensor names
_UNSUPPORTED_KINDS = {
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    **{rules.other_form: rules.other_endings for rules in kohya.BY_KIND.values() if rules.other_form},
    "BOFT": (".boft_R", ".boft_s"),
    "(IA)3": (".on_input", ".ia3_l"),
    "LoRA as nunchaku packs it": tuple(
        f".{name}.lora_down" for name in ("qkv_proj", "qkv_proj_context", "mlp_fc1", "mlp_context_fc1")
    ),
    "VeRA": (".vera_lambda_b", ".vera_lambda_d"),
}


@dataclass(frozen=True)
class NativeTensors:
    """Tensors of a LoRA file renamed to our module names, and the keys that could not be renamed."""

    tensors: dict[str, Tensor]  # of the transformer, by our name
    dialect: str  # for messages
    unnamed_text_keys: tuple[str, ...]  # for text encoders, but ignored or unknown
    text_tensors: Mapping[str, Tensor]  # of text encoders: `lora_te1_text_model_....lora_down.weight`
    unknown_keys: tuple[str, ...]  # keys that do not belong to a LoRA
    duplicate_keys: Mapping[str, str]  # key -> an earlier key with the same meaning
    conflicting_keys: tuple[str, str] | None  # two keys with the same meaning and different values
    # our name of a module -> its path in the file, without prefix: `blocks.0.attn1.to_q`
    paths_in_file: Mapping[str, str]
    joined_lora_counts: Mapping[str, int]  # our name of a module -> number of LoRAs in its factors
    families: tuple[FamilyNames, ...]  # families that have such names and sizes
    family_name: str | None  # the only family whose files have this form of names; None if there are several
    unknown_names: str  # description of the names if no family has them; else ""

    @property
    def family(self) -> FamilyNames | None:
        """The family; None if unknown, or if several families with different module names are possible."""
        if not self.families or not have_same_names(self.families):
            return None
        return self.families[0]


class _ParsedKeys(NamedTuple):
    """The keys of a LoRA file, parsed, and the keys that do not belong to a LoRA."""

    dit_keys: dict[str, ParsedKey]
    text_encoder_keys: dict[str, ParsedTextKey]
    unknown: list[str]

    def list_dialects(self) -> list[str]:
        """Return the dialects of the DiT's keys, sorted; usually a single one."""
        return sorted({parsed.dialect for parsed in self.dit_keys.values()})


class _PossibleFamilies(NamedTuple):
    """The families that a LoRA file may be for."""

    families: list[FamilyNames]
    hint: str | None  # family named by the user, the metadata or the form of the names
    name_by_keys: str | None  # the only family whose files have this form of names; None if there are several


def to_native(
    tensors: Mapping[str, Tensor], family_hint: str | None = None, with_texts: bool = True
) -> NativeTensors:
    """Rename tensors from any dialect (a program's naming scheme) to our names.

    Values are unchanged, except that some programs' factors are joined to one LoRA per module, and that
    DoRA magnitudes stored as vectors become columns. Missing alphas are not added.

    Args:
        tensors: Tensors by name.
        family_hint: Family named by the user or the metadata.
        with_texts: Whether to rename tensors of text encoders too.
    """
    internal_keys = tuple(key for key in tensors if ROW_RANGE in key)  # files must not contain them
    # some programs' fused or numbered factors become one LoRA per module
    rewritten = Rewritten({key: tensors[key] for key in tensors if key not in internal_keys}, {})
    if any(NEEDS_REWRITING.search(key) for key in rewritten.tensors):
        rewritten = rewrite(rewritten.tensors)
    keys = _parse_keys(rewritten.tensors)
    possible = _find_possible_families(keys, rewritten, family_hint)
    our_modules = _map_paths_to_our_names(keys.dit_keys, possible.families)
    dit_names = {key: f"{our_modules[parsed.path]}.{parsed.suffix}" for key, parsed in keys.dit_keys.items()}
    text_names: dict[str, str] = {}
    if with_texts:
        text_names = _map_text_keys_to_our_names(keys.text_encoder_keys, possible)
    # several keys of a file may get the same name; the first one is used
    # Map each of our names to the first key in the file that has it; `names` maps keys to our names
    names = dit_names | text_names
    key_by_name: dict[str, str] = {}
    for key, name in names.items():
        key_by_name.setdefault(name, key)
    # each key whose name an earlier key has too, and that earlier key
    duplicate_keys = {key: key_by_name[name] for key, name in names.items() if key_by_name[name] != key}
    return NativeTensors(
        tensors=_rename(dit_names.values(), key_by_name, rewritten.tensors),
        dialect=" + ".join(keys.list_dialects()),
        unnamed_text_keys=tuple(key for key in keys.text_encoder_keys if key not in text_names),
        text_tensors=_rename(text_names.values(), key_by_name, rewritten.tensors),
        unknown_keys=(*keys.unknown, *internal_keys),
        duplicate_keys=duplicate_keys,
        conflicting_keys=_find_conflicting_keys(duplicate_keys, rewritten.tensors),
        paths_in_file={our_modules[parsed.path]: parsed.path for parsed in keys.dit_keys.values()},
        joined_lora_counts=_count_joined_loras(rewritten.joined_lora_counts, dit_names),
        families=tuple(possible.families),
        family_name=possible.name_by_keys,
        unknown_names=""
        if possible.families
        else describe_unknown(parsed.full_path for parsed in keys.dit_keys.values()),
    )


def _count_joined_loras(joined_lora_counts: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Return how many LoRAs were joined into each module's factors, by our module name."""
    counts: dict[str, int] = {}
    for key, count in joined_lora_counts.items():
        if key in names:
            module = names[key].partition(".")[0]
            counts[module] = count
    return counts


def read_own_names(tensors: Mapping[str, Tensor], family: FamilyNames) -> NativeTensors | None:
    """Return the tensors of a file that uses only our names; None if it uses any other name.

    Files written by us are read this way, which is fast because no other program's names are tried.

    Args:
        tensors: Tensors by name.
        family: Family named in the metadata.
    """
    paths: dict[str, str] = {}
    for key in tensors:
        module, _, factor_name = key.partition(".")
        path = module.removeprefix(OURS)
        has_other_prefix = path == module
        has_other_spelling = factor_name not in FACTOR_NAMES or STORED_AS_VECTOR.search(key) is not None
        if has_other_prefix or has_other_spelling or module_path(path, family) is None:
            return None
        paths[module] = path
    return NativeTensors(
        tensors=dict(tensors),
        dialect=IN_OUR_NAMES,
        unnamed_text_keys=(),
        text_tensors={},
        unknown_keys=(),
        duplicate_keys={},
        conflicting_keys=None,
        paths_in_file=paths,
        joined_lora_counts={},
        families=(family,),
        family_name=None,
        unknown_names="",
    )


def _parse_keys(names: Iterable[str]) -> _ParsedKeys:
    """Parse the keys of a LoRA file."""
    keys = _ParsedKeys({}, {}, [])
    for key in names:
        parsed_text = split_text(key)
        parsed = None if parsed_text is not None else split_key(key)
        if parsed_text is not None:
            keys.text_encoder_keys[key] = parsed_text
        elif parsed is not None:
            keys.dit_keys[key] = parsed
        elif key not in GLOBAL_ALPHA_KEYS:
            keys.unknown.append(key)
    return keys


def _find_possible_families(
    keys: _ParsedKeys, rewritten: Rewritten, family_hint: str | None
) -> _PossibleFamilies:
    """Find the families that a file may be for, by its names and sizes and by the hint."""
    # the family of the first dialect that only one family's files use
    by_dialect = (_FAMILY_BY_DIALECT.get(dialect) for dialect in keys.list_dialects())
    name_by_keys = rewritten.family_name or next(filter(None, by_dialect), None)
    hint = family_hint or name_by_keys
    families = _families_with_modules(keys.dit_keys, rewritten.tensors, hint)
    if len(families) > 1:
        # Narrow down the possible families by the text encoders, then by the spelling of module names
        # A step that would leave no family is skipped.
        last_encoder = max((parsed.number for parsed in keys.text_encoder_keys.values()), default=1)
        remaining = [family for family in families if _has_text_encoder(family, last_encoder)] or [*families]
        underscored = {parsed.path for parsed in keys.dit_keys.values() if "." not in parsed.path}
        families = [family for family in remaining if _may_be_underscored(family, underscored)] or remaining
        if len(families) == 1:
            name_by_keys = families[0].name
    return _PossibleFamilies(families, hint, name_by_keys)


def _families_with_modules(
    keys: Mapping[str, ParsedKey], tensors: Mapping[str, Tensor], hint: str | None
) -> list[FamilyNames]:
    """Return the families that have modules with these names and sizes."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, parsed in keys.items():
        module = OURS + parsed.path.replace(".", "_")
        factors.setdefault(module, {})[parsed.suffix] = tensors[key]
    return find_lora_families(factors, hint) if factors else []


def _has_text_encoder(family: FamilyNames, number: int) -> bool:
    """Return whether a family may have the text encoder with this number, such as 2 for `lora_te2_`."""
    # prefixes may skip a number: FLUX.1 has lora_te1 and lora_te3
    has_prefix = any(prefix.endswith(str(number)) for prefix, _ in family.encoders)
    return has_prefix or len(family.encoders) >= number


def _may_be_underscored(family: FamilyNames, paths: Collection[str]) -> bool:
    """Return whether LoRA files of a family may contain these paths with underscores instead of dots."""
    # For paths of another layout (`input_blocks_1_1_proj_in`), only families whose LoRAs all tools write in
    # this way (SDXL) have such files.
    has_aliases = any(from_alias(path, family) != path for path in paths)
    return not has_aliases or family.underscored_names == "aliases"


def _map_paths_to_our_names(keys: Mapping[str, ParsedKey], families: Sequence[FamilyNames]) -> dict[str, str]:
    """Map module paths in the file, such as `blocks.0.attn1.to_q`, to our names with our prefix."""
    # A path of another layout is translated only if all possible families translate it in the same way.
    modules: dict[str, str] = {}
    for path in dict.fromkeys(parsed.path for parsed in keys.values()):
        module = path.replace(".", "_")
        translations = {from_alias(module, family) for family in families}
        if len(translations) == 1:
            (module,) = translations
        modules[path] = OURS + module
    return modules


def _find_family_for_texts(
    keys: Mapping[str, ParsedTextKey], families: Sequence[FamilyNames], hint: str | None
) -> FamilyNames | None:
    """Return the family whose text encoders a file changes."""
    # Returns None if the possible families have different text encoders; the file's names for them are kept
    # then.
    num_encoders = max((parsed.number for parsed in keys.values()), default=1)  # encoders are numbered from 1
    candidates = [family for family in families if len(family.encoders) >= num_encoders] or families[:1]
    if candidates:
        has_same_encoders = len({family.encoders for family in candidates}) == 1
        return candidates[0] if has_same_encoders else None
    return next((family for family in FAMILIES if family.name == hint), None)


def _map_text_keys_to_our_names(
    keys: Mapping[str, ParsedTextKey], possible: _PossibleFamilies
) -> dict[str, str]:
    """Map text encoder keys of a file to our names, leaving out keys that have none."""
    family = _find_family_for_texts(keys, possible.families, possible.hint)
    names: dict[str, str] = {}
    for key, parsed in keys.items():
        name = name_text(parsed, family)
        if name is not None:
            names[key] = name
    return names


def _rename(
    names: Iterable[str], key_by_name: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors under our names; modules without an alpha get the file's global alpha, if it has one."""
    # Magnitudes that a file stores as vectors become columns.
    modules = dict.fromkeys(name.partition(".")[0] for name in names)
    renamed: dict[str, Tensor] = {}
    for key in GLOBAL_ALPHA_KEYS:
        if key in tensors:
            renamed |= {f"{module}.alpha": tensors[key] for module in modules}
    for name in names:  # a module's own alpha replaces the global one
        key = key_by_name[name]
        tensor = tensors[key]
        if STORED_AS_VECTOR.search(key):
            inner_axes = max(tensor.ndim - 1, 1)
            tensor = tensor.reshape(-1, *[1] * inner_axes)
        renamed[name] = tensor
    return renamed


def _find_conflicting_keys(
    repeated: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[str, str] | None:
    """Return two keys with the same meaning but different values; None if there are none."""
    for key, first_key in repeated.items():
        first = tensors[first_key]
        second = tensors[key]
        if first.shape != second.shape or not first.float().equal(second.float()):
            return first_key, key
    return None


def split_names(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Group the tensor names of a LoRA file by expert; {None: all names} if the file has a single network.

    Experts are recognized by the prefixes of additional networks in diffusers' pipelines, such as
    `transformer_2`. A key for a global alpha is in every group.
    """
    names = list(names)
    experts = {name: further_expert(name) for name in names}  # None for names of the first network
    has_single_network = not any(experts.values())
    if has_single_network:
        return {None: names}
    first_expert = find_networks()[IN_DIFFUSERS]
    global_alphas = [name for name in names if name in GLOBAL_ALPHA_KEYS]
    by_expert: dict[str | None, list[str]] = {}
    for name, expert in experts.items():
        if name not in GLOBAL_ALPHA_KEYS:
            by_expert.setdefault(expert or first_expert, [*global_alphas]).append(name)
    return by_expert


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return (unsupported network kind, a key that shows it); None if no key shows one."""
    for key in keys:
        for kind, endings in _UNSUPPORTED_KINDS.items():
            if key.endswith(endings):
                return kind, key
    return None


def split_tensor_name(name: str) -> tuple[str, str]:
    """Split a tensor name: `model.diffusion_model.blocks.0.ffn.0.weight` -> (`blocks_0_ffn_0`, `weight`).

    A parameter that is not a module's weight or bias counts as a module, as in LoRA files:
    `blocks.0.modulation` -> (`blocks_0_modulation`, `weight`).
    """
    path, _, parameter_name = name.rpartition(".")
    if parameter_name not in _PARAMETER_NAMES:
        path = name
        parameter_name = "weight"
    for prefix in _MODEL_PREFIXES:
        path = path.removeprefix(prefix)
    return path.replace(".", "_"), parameter_name


def find_lora_families(modules: Mapping[str, Factors], hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA may be for, judging by our names and the sizes of its modules."""
    in_dit = _read_dit_deltas(modules)
    return likely_families(in_dit, lambda name: _get_delta_size(in_dit[name]), hint)


def can_be_for(family: FamilyNames, modules: Mapping[str, Factors]) -> bool:
    """Return whether a LoRA's modules, under our names, may have their sizes in the family."""
    in_dit = _read_dit_deltas(modules)
    return sizes_fit(family, in_dit, lambda name: _get_delta_size(in_dit[name]))


def _read_dit_deltas(modules: Mapping[str, Factors]) -> dict[str, Delta]:
    """Return the changes of a transformer's modules, by our names without the prefix."""
    in_dit = {name.removeprefix(OURS): factors for name, factors in modules.items() if name.startswith(OURS)}
    return read_deltas(in_dit)


def _get_delta_size(delta: Delta) -> tuple[int, int] | None:
    """Return the rows and columns of a weight change; None if nothing is added or factors are damaged."""
    if delta.has_row_range:  # the factors belong to a larger layer
        size = delta.matrix_size()
        return None if size is None else (delta.count_rows() or 0, size[1])
    full = delta.factors.get("diff", delta.factors.get(SET_WEIGHT))
    try:
        shape = delta.change_shape() if full is None else tuple(full.shape)
    except MismatchError:  # not reported here, because messages about damaged files name the family too
        return None
    if not shape or 0 in shape:
        return None
    return shape[0], math.prod(shape[1:])


def family_by_text_width(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the U-Net family with the text width of a LoRA's cross-attention; None if no family has it."""
    widths: set[int] = set()
    for name, factors in modules.items():
        if not name.endswith(("attn2_to_k", "attn2_to_v")):  # these layers take text states
            continue
        size = _get_delta_size(read_delta(factors))
        if size is not None:
            widths.add(size[1])
    for family in FAMILIES:
        if (
            family.path_prefix == UNET_IN_DIFFUSERS
            and {width for width, _ in family.released_sizes} == widths
        ):
            return family
    return None
