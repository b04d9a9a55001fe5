"""Write LoRAs in the dialects of ComfyUI and diffusers."""

import itertools
import math
from collections.abc import Callable, Mapping
from logging import getLogger

import torch
from torch import Tensor

from networks import deltas, module_names
from networks.deltas import DORA, LORA, Factors, add_missing_alphas
from networks.key_formats import OTHER
from networks.lora_products import diagonal_blocks, fused_heights
from networks.module_names import alias, module_path, parts_of, to_alias
from networks.names.layouts import IN_COMFYUI, IN_DIFFUSERS, OURS, SWAPPED, UNET_IN_DIFFUSERS, FamilyNames
from networks.names.texts import diffusers_path_of_text
from networks.parts import fuse, settle_rows

logger = getLogger(__name__)
_UNKNOWN = "no known model has a module with this name"
Pieces = Mapping[str, Factors]  # path in the other dialect -> factors
Form = dict[str, Tensor] | str  # tensors of a module by the ends of their names, or why there are none
# a LoRA in another dialect, and the modules that have no form there, each with the reason
Written = tuple[dict[str, Tensor], dict[str, str]]


def in_dialect(
    tensors: Mapping[str, Tensor], family: FamilyNames | None, target: str, start: str = IN_DIFFUSERS
) -> Written:
    """Convert ours to the names of ComfyUI ("other") or diffusers: `diffusion_model.<path>.lora_A.weight`.

    Both factors are multiplied by sqrt(alpha / rank), alpha is left out; LoHa and LoKr keep their factors and
    alphas. Only ComfyUI reads these, except LoKrs of two families: diffusers takes files with LoKrs only,
    under ComfyUI's names. A whole difference of a matrix becomes a LoRA of full rank for
    diffusers, which is exact. Module paths come from the list of the family's real modules.
    start: of the names in diffusers, by the network of the pipeline.

    If diffusers splits the fused weights of a family, such as FLUX, the parts share the down factor, or have
    their own if the up factor is block-diagonal; alpha / rank is folded in by powers of two, which is exact.
    ai-toolkit and ComfyUI read FLUX's plain LoRAs in this form too, all else in the form of ours.
    """
    if family is None:
        return {}, dict.fromkeys(deltas.group_by_module(tensors), _UNKNOWN)
    modules = deltas.group_by_module(tensors)
    if target == "diffusers" and family.lokr_in_diffusers and all(map(_is_lokr, modules.values())):
        # names of diffusers' own layout have no prefix, and all must be of one layout
        cut = any(module_names.part_path(name.removeprefix(OURS), family) for name in modules)
        begin = "" if cut else OTHER
        return _write(tensors, begin, lambda name, one: _lokr_path(name, one, family, cut), _in_comfyui)
    if target == "diffusers" or (family.is_as_in_diffusers and family.start != IN_COMFYUI):
        begin = UNET_IN_DIFFUSERS if family.start == UNET_IN_DIFFUSERS else start
        form = _in_toolkit if family.parts else _in_diffusers
        return _write(tensors, begin, lambda name, factors: _pieces(name, factors, family), form)
    plain: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    cuts = family.parts and family.start == IN_DIFFUSERS
    for name, factors in modules.items():
        is_plain = cuts and factors.keys() <= deltas.OF_LOW_RANK
        (plain if is_plain else others).update({f"{name}.{part}": one for part, one in factors.items()})
    written, left_out = in_dialect(plain, family, "diffusers")
    others |= {name: one for name, one in plain.items() if name.partition(".")[0] in left_out}
    whole, left_out = _write(
        others, OTHER, lambda name, factors: _alone(module_path(name, family), factors), _in_comfyui
    )
    return {**written, **whole}, left_out


def _is_lokr(factors: Factors) -> bool:
    """Return whether diffusers can read the factors as a LoKr: no core, magnitudes or biases."""
    return factors.keys() <= {"alpha", *(f"lokr_w{n}{x}" for n in "12" for x in ("", "_a", "_b"))}


def _lokr_path(name: str, factors: Factors, family: FamilyNames, cut: bool) -> Pieces | str:
    """Return a LoKr by its path, or why there is none. cut: the file has layers of diffusers' layout."""
    parts = parts_of(name, family)
    if any(part.index == SWAPPED for _, part in parts):
        return "its halves stand the other way round in diffusers, which does not swap those of a LoKr"
    if not cut:
        return _alone(module_path(name, family), factors)
    path = parts[0][0] if len(parts) == 1 else module_names.part_path(name, family)
    return _alone(path, factors, "diffusers has it in parts, as the file has other layers")


def texts_to_diffusers(tensors: Mapping[str, Tensor]) -> Written:
    """`lora_te1_text_model_...` -> `text_encoder.text_model. ... .lora_A/lora_B.weight`, as diffusers has it.

    CLIP-L is `text_encoder`, T5 `text_encoder_2`. Encoders that no pipeline of diffusers takes LoRAs for are
    left out.
    """
    why = "diffusers has no such text encoder"
    return _write(tensors, "", lambda name, one: _alone(diffusers_path_of_text(name), one, why), _in_toolkit)


def _alone(path: str | None, factors: Factors, why: str = _UNKNOWN) -> Pieces | str:
    return why if path is None else {path: factors}


def _write(
    tensors: Mapping[str, Tensor],
    start: str,
    pieces_of: Callable[[str, Factors], Pieces | str],
    form_of: Callable[[Factors], Form],
) -> Written:
    """Return the tensors in a dialect. pieces_of: maps a module (without our prefix) and its factors to
    factors by path there, or to a reason why there are none.
    """
    written: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, factors in deltas.group_by_module(tensors).items():
        pieces = pieces_of(name.removeprefix(OURS), factors)
        forms = {} if isinstance(pieces, str) else {path: form_of(one) for path, one in pieces.items()}
        reasons = [form for form in (pieces, *forms.values()) if isinstance(form, str)]
        if reasons:
            left_out[name] = reasons[0]
            continue
        for path, form in forms.items():
            assert not isinstance(form, str)
            begin = "" if module_names.is_unprefixed(path) else start
            written.update({f"{begin}{path}.{part}": tensor for part, tensor in form.items()})
    return written, left_out


def _in_comfyui(factors: Factors) -> dict[str, Tensor]:
    """Return the tensors of a module as ComfyUI reads them.

    Biases are whole differences there. An alpha of 0 means the rank, and is written so.
    """
    rest = {part: one for part, one in factors.items() if part not in ("alpha", *deltas.OF_BIAS)}
    if rest.keys() <= {*LORA, "diff", DORA}:
        form = _fold(factors) | {part: one for part, one in rest.items() if part not in LORA}
    else:
        rank = deltas.rank_of(factors)
        form = rest if rank is None else {**rest, "alpha": torch.tensor(deltas.strength(factors) * rank)}
    bias = deltas.stored_bias(factors)
    return form if bias is None else {**form, "diff_b": bias}


def _in_diffusers(factors: Factors) -> Form:
    """Return the tensors of a module as diffusers and PEFT read them, or why there are none."""
    if "diff" in factors and factors["diff"].ndim == 2 and LORA[0] not in factors and DORA not in factors:
        # a whole difference of a matrix, out x in: the LoRA of it and a unit matrix
        whole = factors["diff"]
        out, inner = whole.shape
        one = torch.eye(min(out, inner), dtype=whole.dtype)
        rest = {part: tensor for part, tensor in factors.items() if part not in ("diff", "alpha")}
        down, up = (whole, one) if out <= inner else (one, whole)
        factors = {**rest, LORA[0]: down, LORA[1]: up}
    if factors.keys() - deltas.OF_LOW_RANK - {DORA} or LORA[0] not in factors:
        return f"{', '.join(sorted(set(factors) - {'alpha'}))} has no form in this dialect"
    if deltas.has_input_magnitudes(factors):
        return "its DoRA magnitudes are by input, diffusers has them by output"
    form = _fold(factors)
    bias = deltas.stored_bias(factors)
    if bias is not None and DORA in factors:
        return "it has a bias beside DoRA magnitudes, which has no form in that dialect"
    if bias is not None:
        form["lora_B.bias"] = bias
    if DORA in factors:
        magnitudes, ndim = factors[DORA], factors[DORA].ndim
        form["lora_magnitude_vector"] = (
            magnitudes.flatten() if ndim == 2 else magnitudes.reshape(1, -1, *[1] * (ndim - 2))
        )
    return form


def _fold(factors: Factors) -> dict[str, Tensor]:
    """Return LoRA factors with alpha / rank split evenly between the two."""
    scale = deltas.strength(factors)
    halves = {
        LORA[0]: ("lora_A.weight", math.sqrt(abs(scale))),
        LORA[1]: ("lora_B.weight", math.copysign(math.sqrt(abs(scale)), scale)),
    }
    return {
        name: (factors[part].float() * half).to(factors[part].dtype)
        for part, (name, half) in halves.items()
        if part in factors
    }


def _in_toolkit(factors: Factors) -> Form:
    """Return the tensors as `_in_diffusers`, with alpha / rank folded in by `deltas.split_strength`."""
    if LORA[0] not in factors:
        return _in_diffusers(factors)
    folded = deltas.fold_strength(factors)
    return _in_diffusers({part: one.contiguous() for part, one in folded.items()})


def _pieces(name: str, factors: Factors, family: FamilyNames) -> Pieces | str:
    """Return the factors of each part of a module by its path in diffusers, or why there are none."""
    path = module_path(name, family) if family.parts else module_names.diffusers_path(name, family)
    if path is None:
        return _UNKNOWN
    parts = parts_of(name, family)
    if not parts:
        return {path: factors}  # the same in both layouts
    (theirs, part), *others = parts
    if others:
        return _cut(factors, [path for path, _ in parts])
    if part.index != SWAPPED:
        return {theirs: factors}
    whole = next((len(factors[one]) for one in (LORA[1], "diff", "diff_b") if one in factors), 0)
    swapped = deltas.rows_of(factors, torch.arange(whole).roll(whole // 2)) if whole else None
    return "it has no rows to swap" if swapped is None else {theirs: swapped}


def _cut(factors: Factors, paths: list[str]) -> Pieces | str:
    if LORA[0] in factors and factors[LORA[1]].ndim == 2:
        rows, columns = len(factors[LORA[1]]), factors[LORA[0]].shape[1]
    elif factors.keys() <= {"diff", "diff_b", "alpha"} and "diff" in factors and factors["diff"].ndim == 2:
        rows, columns = factors["diff"].shape
    else:
        return "only plain LoRAs and whole differences can be cut into the parts of a weight"
    heights = fused_heights(len(paths), rows, columns)
    if not heights:
        return f"its {rows} rows are not those of {len(paths)} parts"
    is_plain = LORA[0] in factors and len(factors) <= 3
    blocks = diagonal_blocks(factors[LORA[1]], heights) if is_plain else None
    if blocks is not None:
        downs = factors[LORA[0]].chunk(len(paths))
        alpha = torch.tensor(deltas.strength(factors) * (len(factors[LORA[0]]) // len(paths)))
        pairs = zip(downs, blocks, strict=True)
        cut: list[Factors | None] = [{LORA[0]: down, LORA[1]: up, "alpha": alpha} for down, up in pairs]
    else:
        starts = itertools.accumulate(heights, initial=0)
        places = zip(starts, heights, strict=False)
        cut = [deltas.rows_of(factors, slice(start, start + height)) for start, height in places]
    found = {path: one for path, one in zip(paths, cut, strict=True) if one is not None}
    if len(found) < len(paths):
        return "its magnitudes belong to the whole weight"
    # the whole is zero in the rows of a part that it was joined without
    return {
        path: one
        for path, one in found.items()
        if any(values.any() for part, values in one.items() if part not in {LORA[0], "alpha"})
    } or found


def in_target(
    native: Mapping[str, Tensor], family: FamilyNames | None, target: str, start: str = IN_DIFFUSERS
) -> Written:
    """Return a LoRA for a DiT under the names of a target: "default" (ours), "other" (ComfyUI), "diffusers".

    native: on the family's own modules, see `in_own_form`. start: as for `in_dialect`.
    """
    names = "" if family is None or target == "diffusers" else family.always_underscored
    if target == "other" and family is not None and family.underscored:
        names = "aliases"
    if not names and target != "default":
        return in_dialect(native, family, target, start)
    tensors = add_missing_alphas(native)
    if names == "aliases" and family is not None:
        tensors = rename_to_aliases(tensors, family)
    return tensors, {}


def in_own_form(tensors: Mapping[str, Tensor], family: FamilyNames | None) -> Mapping[str, Tensor]:
    """Return our LoRA on the modules that the family's model has here: parts joined, or stacks split.

    Raises CheckpointError if a part of a joined layer has no form of its own.
    """
    if family is not None and family.joined:
        return settle_rows(take_apart(tensors, family))
    is_joined = family is None or family.parts
    return settle_rows(fuse(tensors, family=family) if is_joined else tensors)


def take_apart(tensors: Mapping[str, Tensor], family: FamilyNames) -> dict[str, Tensor]:
    """Convert modules that another layout stacks or names otherwise to the family's own.

    Modules that cannot be split stay whole, with a warning.
    """
    apart: dict[str, Factors] = {}
    for name, factors in deltas.group_by_module(rename_to_aliases(tensors, family, alias)).items():
        paths = [OURS + path.replace(".", "_") for path, _ in parts_of(name.removeprefix(OURS), family)]
        pieces = _cut(factors, paths) if paths else {name: factors}
        if isinstance(pieces, str):
            logger.warning(f"{name}: {pieces}; it stays whole")
            pieces = {name: factors}
        apart.update(pieces)
    # copies: files cannot hold tensors that share memory
    return {name: tensor.clone() for name, tensor in deltas.ungroup(apart).items()}


def rename_to_aliases(
    tensors: Mapping[str, Tensor], family: FamilyNames, change: Callable[[str, FamilyNames], str] = to_alias
) -> dict[str, Tensor]:
    """Return the tensors of our LoRA renamed to the family's aliases where modules have one.

    change: `to_alias`, or `alias` for the way back.
    """
    renamed = {}
    for name, tensor in tensors.items():
        module, dot, part = name.removeprefix(OURS).partition(".")
        own = name.startswith(OURS)
        renamed[f"{OURS}{change(module, family)}{dot}{part}" if own else name] = tensor
    return renamed
