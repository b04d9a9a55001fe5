"""Write LoRAs in the dialects of ComfyUI and diffusers.

A function that cannot convert a module returns the reason as a string.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from logging import getLogger
from typing import NamedTuple

import torch
from torch import Tensor

from networks import module_names
from networks.delta import Delta, read_delta
from networks.formats.comfyui import find_module_error
from networks.formats.diffusers import describe_kind
from networks.fused_loras import join_parts, joined_blocks, resolve_rows
from networks.kinds import KINDS
from networks.kinds.composing import MAGNITUDE_KIND_NAME, MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.lora_products import count_fused_part_rows
from networks.module_factors import (
    BIAS_FACTORS,
    LORA_FACTORS,
    PLAIN_LORA_FACTORS,
    SET_WEIGHT,
    add_missing_alphas,
    compute_scaling,
    fold_scaling,
    get_lora_rank,
    group_by_module,
    ungroup,
)
from networks.module_names import (
    find_fused_path,
    find_parts,
    from_alias,
    is_fused_elsewhere,
    module_path,
    part_path,
    to_alias,
)
from networks.names.layouts import IN_COMFYUI, IN_DIFFUSERS, OURS, SWAPPED, UNET_IN_DIFFUSERS, FamilyNames
from networks.names.texts import find_comfyui_text_path, find_diffusers_text_path
from networks.tensor_names import MAGNITUDES_END, PEFT_ENDS

logger = getLogger(__name__)
_UNKNOWN = "no known model has a module with this name"
Pieces = Mapping[str, Factors]  # path in the other dialect -> factors
# tensors of a module by the endings of their names, or why it cannot be converted
ConvertedFactors = dict[str, Tensor] | str


class TranslatedModules(NamedTuple):
    """A LoRA under another program's names, and the modules that this program has no names for."""

    tensors: dict[str, Tensor]
    left_out: dict[str, str]  # module -> reason


def in_dialect(
    tensors: Mapping[str, Tensor],
    family: FamilyNames | None,
    target: str,
    diffusers_prefix: str = IN_DIFFUSERS,
) -> TranslatedModules:
    """Convert our names to ComfyUI's (target "other") or diffusers': `diffusion_model.<path>.lora_A.weight`.

    alpha / rank is multiplied into the factors of a LoRA (folded), and alpha is dropped. Other kinds keep
    their factors and alphas; only ComfyUI reads them, except for kinds with a `peft_prefix` or in the
    family's `kinds_in_diffusers`. For diffusers, the full difference of a matrix becomes a LoRA of full rank,
    which is exact.

    If diffusers splits the fused weights of a family, such as FLUX, the parts share the down factor, or have
    their own if the up factor is block-diagonal. ai-toolkit and ComfyUI read plain LoRAs of FLUX in this form
    too, but other kinds only with our modules.

    Args:
        tensors: Tensors by name.
        family: The model family.
        target: "other" for ComfyUI, or "diffusers".
        diffusers_prefix: Prefix of names in diffusers: the name of the network in the pipeline.

    Returns:
        The tensors in the dialect, and the modules that it cannot express.
    """
    modules = group_by_module(tensors)
    if family is None:
        return TranslatedModules({}, dict.fromkeys(modules, _UNKNOWN))
    # for some families, whose path prefix is not `diffusion_model.`, ComfyUI reads diffusers' names
    has_diffusers_names = family.is_as_in_diffusers and family.path_prefix != IN_COMFYUI
    if target == "other" and not has_diffusers_names:
        return _to_comfyui(modules, family)
    if target == "diffusers":
        for kind in KINDS:
            peft_prefix = describe_kind(kind).peft_prefix
            if peft_prefix and all(kind.marks[0] in factors for factors in modules.values()):
                return _write_in_diffusers_layout(modules, family, peft_prefix)
            own_factors = {"alpha", *kind.parts}.difference(kind.cores)
            is_plain = all(factors.keys() <= own_factors for factors in modules.values())
            if kind.name in family.kinds_in_diffusers and is_plain:
                return _write_unsplit(modules, family, kind.name)
    prefix = UNET_IN_DIFFUSERS if family.path_prefix == UNET_IN_DIFFUSERS else diffusers_prefix
    # families with fused parts: alpha / rank is folded exactly, by powers of two
    convert_factors = _in_toolkit if family.parts else _in_diffusers
    return write_modules(
        modules, prefix, lambda name, factors: _split_for_diffusers(name, factors, family), convert_factors
    )


def _to_comfyui(modules: Mapping[str, Factors], family: FamilyNames) -> TranslatedModules:
    """Return modules under ComfyUI's names."""
    # Plain LoRAs of weights that diffusers splits are written as for diffusers, all others under our modules.
    is_split_in_diffusers = family.parts and family.path_prefix == IN_DIFFUSERS
    plain_loras: dict[str, Factors] = {}
    other_modules: dict[str, Factors] = {}
    for name, factors in modules.items():
        if is_split_in_diffusers and factors.keys() <= PLAIN_LORA_FACTORS:
            plain_loras[name] = factors
        else:
            other_modules[name] = factors
    as_diffusers = in_dialect(ungroup(plain_loras), family, "diffusers")
    # plain LoRAs that cannot be split are written under our modules
    for name in as_diffusers.left_out:
        other_modules[name] = plain_loras[name]
    as_ours = write_modules(
        other_modules,
        IN_COMFYUI,
        lambda name, factors: single_piece(module_path(name, family), factors),
        in_comfyui,
    )
    return TranslatedModules({**as_diffusers.tensors, **as_ours.tensors}, as_ours.left_out)


def _write_in_diffusers_layout(
    modules: Mapping[str, Factors], family: FamilyNames, start: str
) -> TranslatedModules:
    """Return modules under diffusers' names, with fused weights split as in diffusers.

    Args:
        modules: Factors of each module, by name.
        family: The model family.
        start: Prefix of the names in the file, such as `transformer.`.
    """
    return write_modules(
        modules, start, lambda name, factors: _split_for_diffusers(name, factors, family), _in_diffusers
    )


def _write_unsplit(modules: Mapping[str, Factors], family: FamilyNames, kind: str) -> TranslatedModules:
    """Return modules of a kind such as LoKr in the format that both diffusers and ComfyUI read."""
    # either all modules are written in diffusers' layout, which has no prefix, or all in ComfyUI's
    is_in_diffusers = any(part_path(name.removeprefix(OURS), family) for name in modules)

    def find_piece(name: str, factors: Factors) -> Pieces | str:
        parts = find_parts(name, family)
        if any(path_and_part.part.index == SWAPPED for path_and_part in parts):  # its rows cannot be swapped
            return f"diffusers has its halves in the opposite order, and does not swap those of a {kind}"
        if not is_in_diffusers:
            return single_piece(module_path(name, family), factors)
        is_renamed = len(parts) == 1
        # None for a module of our layout, such as a fused qkv
        path = parts[0].path if is_renamed else part_path(name, family)
        return single_piece(path, factors, reason="diffusers splits it, like other layers of the file")

    return write_modules(modules, "" if is_in_diffusers else IN_COMFYUI, find_piece, in_comfyui)


def texts_to_diffusers(tensors: Mapping[str, Tensor]) -> TranslatedModules:
    """Rename text encoder LoRAs to diffusers' names, `text_encoder.text_model. ... .lora_A.weight`.

    CLIP-L is `text_encoder`, T5 `text_encoder_2`. Encoders for which no diffusers pipeline loads LoRAs are
    left out.
    """
    reason = "diffusers has no such text encoder"
    return write_modules(
        group_by_module(tensors),
        "",
        lambda name, factors: single_piece(find_diffusers_text_path(name), factors, reason),
        _in_toolkit,
    )


def texts_to_comfyui(tensors: Mapping[str, Tensor], family: FamilyNames | None) -> dict[str, Tensor]:
    """Rename text encoder tensors to ComfyUI's dotted names, `text_encoders.NAME.transformer.model...`.

    Encoders that ComfyUI reads under our names (`lora_te_...`) keep them; missing alphas are added.
    """
    starts = () if family is None else family.texts_in_comfyui
    unchanged: dict[str, Tensor] = {}
    renamed: dict[str, Tensor] = {}
    for name, factors in group_by_module(tensors).items():
        path = find_comfyui_text_path(name, starts)
        if path is None:  # an encoder that ComfyUI reads under our names
            unchanged |= ungroup({name: factors})
        else:
            renamed |= {
                f"{path}.{factor_name}": tensor for factor_name, tensor in in_comfyui(factors).items()
            }
    return {**renamed, **add_missing_alphas(unchanged)}


def single_piece(path: str | None, factors: Factors, reason: str = _UNKNOWN) -> Pieces | str:
    """Return {path: factors} for a module that is not split, or `reason` if it has no path.

    Args:
        path: Path of the module under the other program's names; None if the program lacks the module.
        factors: Factors of the module, by factor name.
        reason: Why there is no path.
    """
    return reason if path is None else {path: factors}


def write_modules(
    modules: Mapping[str, Factors],
    prefix: str,
    split_module: Callable[[str, Factors], Pieces | str],
    convert_factors: Callable[[Factors], ConvertedFactors],
) -> TranslatedModules:
    """Return a network's tensors under another program's names.

    A module is written completely, or left out with a reason.

    Args:
        modules: Factors by our module names.
        prefix: Prefix of the program's names.
        split_module: Takes our name of a module, without prefix, and its factors; returns factors by path in
            the program, or the reason why the program cannot express them.
        convert_factors: Converts factors to the program's tensors, or returns the reason why that is
            impossible.
    """
    written_tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}  # name of a module -> reason
    for name, factors in modules.items():
        pieces = split_module(name.removeprefix(OURS), factors)
        if isinstance(pieces, str):
            left_out[name] = pieces
            continue
        module_tensors = _name_tensors(pieces, prefix, convert_factors)
        if isinstance(module_tensors, str):
            left_out[name] = module_tensors
        else:
            written_tensors |= module_tensors
    return TranslatedModules(written_tensors, left_out)


def _name_tensors(
    pieces: Pieces, prefix: str, convert_factors: Callable[[Factors], ConvertedFactors]
) -> ConvertedFactors:
    """Return the tensors of a module's pieces by full name, or the reason why a piece cannot be converted."""
    named: dict[str, Tensor] = {}
    for path, factors in pieces.items():
        converted = convert_factors(factors)
        if isinstance(converted, str):
            return converted
        path_prefix = "" if module_names.is_unprefixed(path) else prefix
        for part, tensor in converted.items():
            named[f"{path_prefix}{path}.{part}"] = tensor
    return named


def in_comfyui(factors: Factors) -> dict[str, Tensor]:
    """Return a module's tensors as ComfyUI reads them; a change of the bias becomes `diff_b`."""
    tensors = {
        factor_name: tensor
        for factor_name, tensor in factors.items()
        if factor_name not in ("alpha", *BIAS_FACTORS)
    }
    rank = get_lora_rank(factors)
    can_fold_alpha = tensors.keys() <= {*LORA_FACTORS, "diff", MAGNITUDES}
    if can_fold_alpha:
        unchanged = {
            factor_name: tensor for factor_name, tensor in tensors.items() if factor_name not in LORA_FACTORS
        }
        tensors = _fold(factors) | unchanged
    elif rank is not None:
        # an alpha of 0 means the rank, so the rank is written
        tensors["alpha"] = torch.tensor(compute_scaling(factors) * rank)
    bias = read_delta(factors).bias_in_file_dtype()
    if bias is not None:
        tensors["diff_b"] = bias
    return tensors


def _in_diffusers(factors: Factors) -> ConvertedFactors:
    """Return a module's tensors as diffusers and PEFT read them, or why they cannot read the module."""
    delta = read_delta(factors)
    rotation = delta.rotation
    if rotation is not None:  # a single tensor, which is written unchanged
        return {rotation.factor_name: factors[rotation.factor_name]}
    is_full_difference = factors.keys().isdisjoint({DOWN, MAGNITUDES}) and "diff" in factors
    if is_full_difference and factors["diff"].ndim == 2:
        # Convert a full matrix difference, out x in, to a LoRA whose other factor is an identity matrix
        difference = factors["diff"]
        out_features, in_features = difference.shape
        identity = torch.eye(min(out_features, in_features), dtype=difference.dtype)
        lora = {part: tensor for part, tensor in factors.items() if part not in ("diff", "alpha")}
        if out_features <= in_features:  # the smaller rank
            lora[DOWN] = difference
            lora[UP] = identity
        else:
            lora[DOWN] = identity
            lora[UP] = difference
        factors = lora
    error = _find_peft_error(factors, delta)
    if error is not None:
        return error
    # alpha / rank goes into the factors, because PEFT's files have no alpha tensors
    tensors = _fold(factors)
    bias = delta.bias_in_file_dtype()
    if bias is not None:
        tensors[PEFT_ENDS["lora_up.bias"]] = bias
    if MAGNITUDES in factors:
        tensors[MAGNITUDES_END] = _to_peft_magnitudes(factors[MAGNITUDES])
    return tensors


def _find_peft_error(factors: Factors, delta: Delta) -> str | None:
    """Return why PEFT has no form for a module's factors; None if it has."""
    if factors.keys() - PLAIN_LORA_FACTORS - {MAGNITUDES} or DOWN not in factors:
        factor_names = sorted(factors.keys() - {"alpha"})
        return f"{', '.join(factor_names)} cannot be expressed in this dialect"
    if delta.has_input_magnitudes:
        return f"its {MAGNITUDE_KIND_NAME} magnitudes are by input, but diffusers has them by output"
    if MAGNITUDES in factors and delta.bias_in_file_dtype() is not None:
        return f"it has both a bias and {MAGNITUDE_KIND_NAME} magnitudes, which this dialect cannot express"
    return None


def _to_peft_magnitudes(magnitudes: Tensor) -> Tensor:
    """Reshape DoRA magnitudes, out x 1 (x 1 ...), to PEFT's: out, or 1 x out x 1 x 1 for convolutions."""
    num_kernel_axes = magnitudes.ndim - 2
    if num_kernel_axes:
        return magnitudes.reshape(1, -1, *[1] * num_kernel_axes)
    return magnitudes.flatten()


def _fold(factors: Factors) -> dict[str, Tensor]:
    """Return LoRA factors under PEFT's names, each multiplied by sqrt(alpha / rank) to need no alpha."""
    scale = compute_scaling(factors)
    root = math.sqrt(abs(scale))
    folded: dict[str, Tensor] = {}
    if DOWN in factors:
        down = factors[DOWN]
        folded[PEFT_ENDS[DOWN]] = (down.float() * root).to(down.dtype)
    if UP in factors:
        up = factors[UP]
        folded[PEFT_ENDS[UP]] = (up.float() * math.copysign(root, scale)).to(up.dtype)
    return folded


def _in_toolkit(factors: Factors) -> ConvertedFactors:
    """Return diffusers' tensors with alpha / rank folded into the factors, by a power of two in up."""
    if DOWN not in factors:
        return _in_diffusers(factors)
    folded = fold_scaling(factors)
    return _in_diffusers({part: tensor.contiguous() for part, tensor in folded.items()})


def _split_for_diffusers(name: str, factors: Factors, family: FamilyNames) -> Pieces | str:
    """Return {path in diffusers: factors} for each part of a module, or why it cannot be split."""
    path = module_path(name, family) if family.parts else module_names.diffusers_path(name, family)
    if path is None:
        return _UNKNOWN
    parts = find_parts(name, family)
    has_same_name = not parts
    if has_same_name:
        return {path: factors}
    is_split = len(parts) > 1
    if is_split:
        return _cut(factors, [part_path for part_path, _ in parts])
    ((renamed_path, part),) = parts
    if part.index != SWAPPED:
        return {renamed_path: factors}
    swapped = _swap_halves(factors)
    return "it has no rows to swap" if swapped is None else {renamed_path: swapped}


def _swap_halves(factors: Factors) -> Factors | None:
    """Swap the halves of a norm's scale and shift, as the other layout has them; None if impossible."""
    delta = read_delta(factors)
    if delta.rotation is not None:  # an input rotation is the same for all rows
        return factors
    row_tensors = [factors[key] for key in (UP, "diff", SET_WEIGHT, "diff_b") if key in factors]
    num_rows = len(row_tensors[0]) if row_tensors else 0
    if not num_rows:
        return None
    swapped = delta.select_rows(torch.arange(num_rows).roll(num_rows // 2))
    return None if swapped is None else swapped.factors


def _cut(factors: Factors, paths: list[str]) -> Pieces | str:
    """Return {path: factors} for the parts of a fused weight, or the reason why it cannot be split."""
    # an input rotation is the same for all rows, so each part gets a copy
    rotation = read_delta(factors).rotation
    if rotation is not None:
        return {path: {rotation.factor_name: factors[rotation.factor_name].clone()} for path in paths}
    size = _size_to_cut(factors)
    if size is None:
        return "only plain LoRAs and whole differences can be cut into the parts of a weight"
    rows, columns = size
    row_counts = _count_part_rows(len(paths), rows, columns)
    if not row_counts:
        return f"its {rows} rows are not those of {len(paths)} parts"
    pieces: dict[str, Factors] = {}
    # A LoRA that was joined from LoRAs of the parts is separated into them, with their own ranks. Other parts
    # share the down factor.
    for path, piece in zip(
        paths, joined_blocks(factors, row_counts) or _cut_rows(factors, row_counts), strict=True
    ):
        if piece is None:  # DoRA magnitudes by input cannot be cut by rows
            return "its magnitudes belong to the whole weight"
        pieces[path] = piece
    # a LoRA that was joined from only some of the parts is zero in the other rows: drop those parts
    changing = {path: piece for path, piece in pieces.items() if _changes_any(piece)}
    return changing or pieces


def _count_part_rows(num_parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Return the row count of each part of a fused weight; () if its sizes do not fit."""
    # two parts are keys and values, or the two layers of a gated feed-forward: both have half of the rows
    if num_parts == 2 and rows % 2 == 0:
        return rows // 2, rows // 2
    return count_fused_part_rows(num_parts, rows=rows, columns=columns)


def _size_to_cut(factors: Factors) -> tuple[int, int] | None:
    """Return the rows and columns of a change that can be cut into parts; None if it cannot be cut."""
    if DOWN in factors and factors[UP].ndim == 2:
        return len(factors[UP]), factors[DOWN].shape[1]
    full = factors.get("diff", factors.get(SET_WEIGHT))
    if full is not None and factors.keys() <= {"diff", SET_WEIGHT, "diff_b", "alpha"} and full.ndim == 2:
        return len(full), full.shape[1]
    return None


def _cut_rows(factors: Factors, split_sizes: Sequence[int]) -> list[Factors | None]:
    """Return the factors for each consecutive group of rows; None for a group that cannot be cut out."""
    delta = read_delta(factors)
    parts: list[Factors | None] = []
    start = 0
    for size in split_sizes:
        part = delta.select_rows(slice(start, start + size))
        parts.append(None if part is None else part.factors)
        start += size
    return parts


def _changes_any(factors: Factors) -> bool:
    """Return whether any factor other than the down factor and alpha is nonzero, so the weight changes."""
    if SET_WEIGHT in factors:  # replaces the weight, perhaps by zeros
        return True
    return any(bool(tensor.any()) for part, tensor in factors.items() if part not in {DOWN, "alpha"})


def convert_to_dialect(
    native: Mapping[str, Tensor],
    family: FamilyNames | None,
    target: str,
    diffusers_prefix: str = IN_DIFFUSERS,
) -> TranslatedModules:
    """Return a DiT's LoRA under a target's names: "default" (ours), "other" (ComfyUI) or "diffusers".

    Args:
        native: Tensors by name, for modules in the family's own layout, from `convert_to_our_layout`.
        family: The model family; None if unknown.
        target: The target.
        diffusers_prefix: Prefix of names in diffusers: the name of the network in the pipeline.
    """
    if target == "other":
        # The modules that ComfyUI cannot read, each with the reason
        unreadable: dict[str, str] = {}
        for name, factors in group_by_module(native).items():
            error = find_module_error(factors)
            if error:
                unreadable[name] = error
        if unreadable:  # convert all other modules, and report these as left out
            readable = {
                name: tensor for name, tensor in native.items() if name.partition(".")[0] not in unreadable
            }
            translated = convert_to_dialect(readable, family, target, diffusers_prefix)
            return TranslatedModules(translated.tensors, translated.left_out | unreadable)
        if family is not None and family.stacked_in_comfyui:
            return _write_fused(native, family)
    underscored_names = _select_underscored_names(family, target)
    has_dotted_paths = not underscored_names and target != "default"
    if has_dotted_paths:
        return in_dialect(native, family, target, diffusers_prefix)
    tensors = add_missing_alphas(native)
    if underscored_names == "aliases" and family is not None:
        tensors = rename_to_aliases(tensors, family)
    return TranslatedModules(tensors, {})


def _select_underscored_names(family: FamilyNames | None, target: str) -> str:
    """Return which underscored names a target uses: "ours", "aliases", or "" for dotted paths."""
    if family is None or target == "diffusers":
        return ""
    if target == "other" and family.underscored_in_comfyui:
        return "aliases"
    if target == "other" and family.dotted_in_comfyui:
        return ""
    return family.underscored_names


def _write_fused(native: Mapping[str, Tensor], family: FamilyNames) -> TranslatedModules:
    """Return a LoRA under the names of ComfyUI's layout, which fuses some of the family's modules."""
    # A part that cannot be fused with others, because its factors are not a plain LoRA, is left out.
    fused: dict[str, Factors] = {}
    unfused: list[str] = []  # modules that could not be joined and therefore still have a part's name
    for name, factors in group_by_module(join_parts(native, family=family)).items():
        if is_fused_elsewhere(name.removeprefix(OURS), family):
            unfused.append(name)
        else:
            fused[name] = factors
    reason = "ComfyUI stacks this layer with others, and only plain LoRAs can be stacked"
    if family.underscored_in_comfyui:
        renamed = rename_to_aliases(add_missing_alphas(ungroup(fused)), family)
        return TranslatedModules(renamed, dict.fromkeys(unfused, reason))
    translated = write_modules(
        fused,
        IN_COMFYUI,
        lambda name, factors: single_piece(find_fused_path(name, family), factors),
        in_comfyui,
    )
    return TranslatedModules(translated.tensors, translated.left_out | dict.fromkeys(unfused, reason))


def convert_to_our_layout(tensors: Mapping[str, Tensor], family: FamilyNames | None) -> Mapping[str, Tensor]:
    """Convert a LoRA to the modules of our layout: join parts, or split fused modules.

    Raises:
        CheckpointError: If a part has factors of a larger layer that cannot be converted (`resolve_rows`).
    """
    if family is not None and family.joined:
        return resolve_rows(split_fused_layers(tensors, family))
    is_joined = family is None or family.parts
    return resolve_rows(join_parts(tensors, family=family) if is_joined else tensors)


def split_fused_layers(tensors: Mapping[str, Tensor], family: FamilyNames) -> dict[str, Tensor]:
    """Convert modules of a layout that fuses some of our modules, or names them differently, to ours.

    A module that cannot be split stays fused, with a warning.
    """
    split: dict[str, Factors] = {}
    for name, factors in group_by_module(rename_to_aliases(tensors, family, from_alias)).items():
        parts = find_parts(name.removeprefix(OURS), family)
        paths = [OURS + path.replace(".", "_") for path, part in parts if part in family.joined]
        pieces = _cut(factors, paths) if paths else {name: factors}
        if isinstance(pieces, str):
            logger.warning(f"{name}: {pieces}; it is not split")
            pieces = {name: factors}
        split.update(pieces)
    # copies, because tensors in safetensors files must not share memory
    return {name: tensor.clone() for name, tensor in ungroup(split).items()}


def rename_to_aliases(
    tensors: Mapping[str, Tensor], family: FamilyNames, rename: Callable[[str, FamilyNames], str] = to_alias
) -> dict[str, Tensor]:
    """Rename a LoRA's tensors from our names to the family's aliases, for modules that have one.

    Args:
        tensors: Tensors by name.
        family: The model family.
        rename: `to_alias`; with `from_alias`, tensors are renamed from the aliases to our names instead.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(OURS):
            module, dot, factor_name = name.removeprefix(OURS).partition(".")
            name = f"{OURS}{rename(module, family)}{dot}{factor_name}"
        renamed[name] = tensor
    return renamed
