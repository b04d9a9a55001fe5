"""Write LoRAs in the dialects of ComfyUI and diffusers, or rename their modules alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import save_tensors
from modules.checkpoints.opening import open_checkpoint
from modules.console import as_size, show_box
from modules.errors import CheckpointError
from networks.deltas import (
    DORA,
    LORA,
    Factors,
    bias_delta,
    group_by_module,
    has_input_magnitudes,
    rank_of,
    rows_of,
    strength,
)
from networks.key_formats import OTHER, OURS
from networks.lora_products import diagonal_blocks, fused_heights
from networks.metadata import STALE, add_hashes
from networks.module_names import alias, choose_family, diffusers_path, module_path, parts_of, to_alias
from networks.names.layouts import IN_DIFFUSERS, SWAPPED, FamilyNames, WeightPart
from networks.names.text_encoders import diffusers_path_of_text

_UNKNOWN = "no known model has a module with this name"
Pieces = Mapping[str, Factors]  # path in the other dialect -> factors
Form = dict[str, Tensor] | str  # tensors of a module by the ends of their names, or why there are none


def add_missing_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in our order; a LoRA without alpha gets alpha = rank, an integer."""
    completed = {}
    for module, factors in group_by_module(tensors).items():
        if "alpha" not in factors and LORA[0] in factors:
            completed[f"{module}.alpha"] = torch.tensor(rank_of(factors), dtype=torch.int64)
        completed.update({f"{module}.{part}": tensor for part, tensor in factors.items()})
    return completed


@dataclass(frozen=True)
class OtherTensors:
    """A LoRA in another dialect, and the modules that have no form there, each with the reason."""

    tensors: dict[str, Tensor]
    left_out: dict[str, str]


def to_other(tensors: Mapping[str, Tensor], family_hint: str | None = None) -> OtherTensors:
    """Rename ours to `diffusion_model.<path>.lora_A/lora_B.weight`; both factors times sqrt(alpha / rank),
    alpha left out.

    LoHa and LoKr keep their factors and alphas. FramePack's names begin with `transformer.`, as diffusers
    reads them. Module paths come from the lists of the families' real modules; a name outside them is left
    out and reported.
    """
    family = _family_of(tensors, family_hint)
    if family is None or family.is_as_in_diffusers:
        return to_diffusers(tensors, family_hint)
    return _to_comfyui(tensors, family)


def to_diffusers(
    tensors: Mapping[str, Tensor], family_hint: str | None = None, start: str = IN_DIFFUSERS
) -> OtherTensors:
    """Our names -> `transformer.<path in diffusers>.lora_A/lora_B.weight`, as `to_other`.

    A whole difference of a matrix becomes a LoRA of full rank, which is exact; of other parameters there is
    no form. start: of the names, by the network of the pipeline. Not for families with `parts`.
    """
    family = _family_of(tensors, family_hint)

    if family is None:
        return OtherTensors({}, dict.fromkeys(group_by_module(tensors), _UNKNOWN))
    return _write(tensors, start, lambda name, one: _alone(diffusers_path(name, family), one), _in_diffusers)


def to_diffusers_parts(
    tensors: Mapping[str, Tensor], family: FamilyNames, start: str = IN_DIFFUSERS
) -> OtherTensors:
    """Our names -> `transformer.<path in diffusers>.lora_A/lora_B.weight`, as ai-toolkit writes, for families
    whose fused weights diffusers cuts up, as FLUX's.

    The parts of a fused weight share the down factor, or have their own if the up factor is block-diagonal.
    alpha / rank is folded in by powers of two, which change no digit. Other parts are left out.
    """
    return _write(tensors, start, lambda name, factors: _pieces(name, factors, family), _in_toolkit)


def to_other_parts(tensors: Mapping[str, Tensor], family: FamilyNames) -> OtherTensors:
    """Our names -> diffusers' for plain LoRAs, `diffusion_model.<our path>. ...` for all else.

    ai-toolkit and ComfyUI read the former. A LoHa, a LoKr or a DoRA is read by ComfyUI alone, which has the
    fused weights as they are here: nothing is cut then.
    """
    plain: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, factors in group_by_module(tensors).items():
        into = plain if factors.keys() <= {"alpha", *LORA, "lora_up.bias", "diff_b"} else others
        into.update({f"{name}.{part}": one for part, one in factors.items()})
    cut = to_diffusers_parts(plain, family)
    others |= {name: one for name, one in plain.items() if name.partition(".")[0] in cut.left_out}
    whole = _to_comfyui(others, family)
    return OtherTensors({**cut.tensors, **whole.tensors}, whole.left_out)


def texts_to_diffusers(tensors: Mapping[str, Tensor]) -> OtherTensors:
    """`lora_te1_text_model_...` -> `text_encoder.text_model. ... .lora_A/lora_B.weight`, as diffusers has it.

    CLIP-L is `text_encoder`, T5 `text_encoder_2`. Encoders that no pipeline of diffusers takes LoRAs for are
    left out.
    """
    why = "diffusers has no such text encoder"
    return _write(tensors, "", lambda name, one: _alone(diffusers_path_of_text(name), one, why), _in_toolkit)


def _to_comfyui(tensors: Mapping[str, Tensor], family: FamilyNames) -> OtherTensors:
    """Rename ours -> `diffusion_model.<path>. ...`, whole modules of any kind, as `to_other`."""
    return _write(tensors, OTHER, lambda name, one: _alone(module_path(name, family), one), _in_comfyui)


def _family_of(tensors: Mapping[str, Tensor], hint: str | None) -> FamilyNames | None:
    return choose_family((name.removeprefix(OURS) for name in group_by_module(tensors)), hint)


def _alone(path: str | None, factors: Factors, why: str = _UNKNOWN) -> Pieces | str:
    return why if path is None else {path: factors}


def _write(
    tensors: Mapping[str, Tensor],
    start: str,
    pieces_of: Callable[[str, Factors], Pieces | str],
    form_of: Callable[[Factors], Form],
) -> OtherTensors:
    """Return the tensors in a dialect. pieces_of: module, without our prefix, and its factors -> factors by
    path there, or why there are none.
    """
    written: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, factors in group_by_module(tensors).items():
        pieces = pieces_of(name.removeprefix(OURS), factors)
        found = {} if isinstance(pieces, str) else pieces
        forms = {path: form_of(one) for path, one in found.items()} or {"": str(pieces)}
        reason = next((form for form in forms.values() if isinstance(form, str)), None)
        if reason is not None:
            left_out[name] = reason
            continue
        for path, form in forms.items():
            assert not isinstance(form, str)
            written.update({f"{start}{path}.{part}": tensor for part, tensor in form.items()})
    return OtherTensors(written, left_out)


def _in_comfyui(factors: Factors) -> dict[str, Tensor]:
    """Return the tensors of a module as ComfyUI reads them.

    Biases are whole differences there. An alpha of 0 means the rank, and is written so.
    """
    rest = {part: one for part, one in factors.items() if part not in ("alpha", "diff_b", "lora_up.bias")}
    if rest.keys() <= {*LORA, "diff", DORA}:
        form = _fold(factors) | {part: one for part, one in rest.items() if part not in LORA}
    else:
        rank = rank_of(factors)
        form = rest if rank is None else {**rest, "alpha": torch.tensor(strength(factors) * rank)}
    bias = bias_delta(factors, torch.device("cpu"))
    if bias is not None:
        form["diff_b"] = bias.to(factors["diff_b" if "diff_b" in factors else "lora_up.bias"].dtype)
    return form


def _in_diffusers(factors: Factors) -> Form:
    """Return the tensors of a module as diffusers and PEFT read them, or why there are none."""
    if "diff" in factors and factors["diff"].ndim == 2 and LORA[0] not in factors and DORA not in factors:
        factors = _at_full_rank(factors)
    if set(factors) - {"alpha", *LORA, "diff_b", "lora_up.bias", DORA} or LORA[0] not in factors:
        return f"{', '.join(sorted(set(factors) - {'alpha'}))} has no form in this dialect"
    if has_input_magnitudes(factors):
        return "its DoRA magnitudes are by input, diffusers has them by output"
    form = _fold(factors)
    bias = bias_delta(factors, torch.device("cpu"))
    if bias is not None and DORA in factors:
        return "it has a bias beside DoRA magnitudes, which has no form in that dialect"
    if bias is not None:
        form["lora_B.bias"] = bias.to(factors["diff_b" if "diff_b" in factors else "lora_up.bias"].dtype)
    if DORA in factors:
        magnitudes, ndim = factors[DORA], factors[DORA].ndim
        form["lora_magnitude_vector"] = (
            magnitudes.flatten() if ndim == 2 else magnitudes.reshape(1, -1, *[1] * (ndim - 2))
        )
    return form


def _at_full_rank(factors: Factors) -> Factors:
    """Return a LoRA for a whole difference of a matrix, out x in: the difference and a unit matrix."""
    whole = factors["diff"]
    out, inner = whole.shape
    rest = {part: tensor for part, tensor in factors.items() if part not in ("diff", "alpha")}
    if out <= inner:
        return {**rest, LORA[0]: whole, LORA[1]: torch.eye(out, dtype=whole.dtype)}
    return {**rest, LORA[0]: torch.eye(inner, dtype=whole.dtype), LORA[1]: whole}


def _fold(factors: Factors) -> dict[str, Tensor]:
    """LoRA factors with alpha / rank shared out between the two."""
    scale = strength(factors)
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
    return _in_diffusers(_folded(factors))


def _pieces(name: str, factors: Factors, family: FamilyNames) -> Pieces | str:
    """Return the factors of each part of a module by its path in diffusers, or why there are none."""
    path, parts = module_path(name, family), parts_of(name, family)
    if path is None:
        return _UNKNOWN
    if not parts:
        return {path: factors}  # the same in both layouts
    (theirs, part), *others = parts
    if not others:
        if part.index != SWAPPED:
            return {theirs: factors}
        whole = next((len(factors[one]) for one in (LORA[1], "diff", "diff_b") if one in factors), 0)
        swapped = rows_of(factors, torch.arange(whole).roll(whole // 2)) if whole else None
        return "it has no rows to swap" if swapped is None else {theirs: swapped}
    return _cut(factors, parts)


def _cut(factors: Factors, parts: list[tuple[str, WeightPart]]) -> Pieces | str:
    if LORA[0] not in factors or factors[LORA[1]].ndim != 2:
        return "only plain LoRAs can be cut into the parts of a weight"
    heights = fused_heights(len(parts), len(factors[LORA[1]]), factors[LORA[0]].shape[1])
    if not heights:
        return f"its {len(factors[LORA[1]])} rows are not those of {len(parts)} parts"
    blocks = None if len(factors) > 3 else diagonal_blocks(factors[LORA[1]], heights)
    downs, rank = factors[LORA[0]].chunk(len(parts)), len(factors[LORA[0]]) // len(parts)
    pieces: dict[str, Factors] = {}
    start = 0
    for index, ((theirs, _), height) in enumerate(zip(parts, heights, strict=True)):
        if blocks is None:
            piece = rows_of(factors, slice(start, start + height))
            if piece is None:
                return "its magnitudes belong to the whole weight"
            pieces[theirs] = piece
        else:
            alpha = torch.tensor(strength(factors) * rank)
            pieces[theirs] = {LORA[0]: downs[index], LORA[1]: blocks[index], "alpha": alpha}
        start += height
    return pieces


def _folded(factors: Factors) -> Factors:
    """Return LoRA factors with alpha / rank multiplied into them, alpha = rank; others as they are.

    The down factor takes it, and powers of two go over to the up factor until they are about as large.
    """
    if LORA[0] not in factors:
        return factors
    down, up = strength(factors), 1.0
    while 0 < abs(down) * 2 < up:
        down, up = down * 2, up / 2
    folded = {LORA[0]: down, LORA[1]: up}
    scaled = {part: (factors[part].float() * by).to(factors[part].dtype) for part, by in folded.items()}
    if "lora_up.bias" in factors:
        bias = factors["lora_up.bias"]
        scaled["lora_up.bias"] = (bias.float() * strength(factors)).to(bias.dtype)
    return {**{part: one.contiguous() for part, one in factors.items() if part != "alpha"}, **scaled}


def rename_to_aliases(tensors: Mapping[str, Tensor], family: FamilyNames) -> dict[str, Tensor]:
    """Return the tensors of our LoRA, renamed to the family's aliases where modules have one."""
    return _rename(tensors, family, to_alias)


def _rename(
    tensors: Mapping[str, Tensor], family: FamilyNames, change: Callable[[str, FamilyNames], str]
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        module, dot, part = name.removeprefix(OURS).partition(".")
        own = name.startswith(OURS)
        renamed[f"{OURS}{change(module, family)}{dot}{part}" if own else name] = tensor
    return renamed


def rename_file(source: Path, output: Path, family: FamilyNames, reverse: bool) -> None:
    """Write a LoRA of ours with ComfyUI's module names, or the other way round (`reverse`).

    Tensors and metadata stay; hashes are made anew if there are metadata. Raises CheckpointError if nothing
    in the file has a name to change.
    """
    with open_checkpoint(source) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith(STALE)}
    renamed = _rename(stored, family, alias if reverse else to_alias)
    if renamed.keys() == stored.keys():
        direction = "ComfyUI's names to ours" if reverse else "our names to ComfyUI's"
        raise CheckpointError(
            f"{source} has no module to rename from {direction}, such as "
            f"{next(iter(stored), 'none')}.\n  Give a LoRA for {family.name}; --reverse is the way back.",
            source,
        )
    save_tensors(output, renamed, add_hashes(renamed, metadata) if metadata else {})
    changed = len(renamed.keys() - stored.keys())
    rows = [
        ("from", str(source)),
        ("to", f"{output} ({as_size(output.stat().st_size)})"),
        ("tensors", f"{len(renamed)}, {changed} with another name"),
    ]
    show_box("The LoRA is converted", rows)
