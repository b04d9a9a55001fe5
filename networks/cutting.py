"""Write LoRAs in diffusers' layout for families whose fused weights it cuts up, as FLUX's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from networks.deltas import LORA, Factors, group_by_module, rows_of, strength
from networks.key_formats import OURS, OtherTensors, in_diffusers, to_comfyui
from networks.lora_products import diagonal_blocks, fused_heights
from networks.module_names import module_path, parts_of
from networks.names.layouts import IN_DIFFUSERS, SWAPPED, FamilyNames, WeightPart
from networks.names.text_encoders import diffusers_path_of_text


def to_diffusers_parts(
    tensors: Mapping[str, Tensor], family: FamilyNames, start: str = IN_DIFFUSERS
) -> OtherTensors:
    """Our names -> `transformer.<path in diffusers>.lora_A/lora_B.weight`, as ai-toolkit writes.

    The parts of a fused weight share the down factor, or have their own if the up factor is block-diagonal.
    alpha / rank is folded in by powers of two, which change no digit. What has no form there is left out.
    """
    written: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, factors in group_by_module(tensors).items():
        pieces = _pieces(name.removeprefix(OURS), factors, family)
        if isinstance(pieces, str):
            left_out[name] = pieces
            continue
        forms = {path: in_diffusers(_folded(piece)) for path, piece in pieces.items()}
        reason = next((form for form in forms.values() if isinstance(form, str)), None)
        if reason is not None:
            left_out[name] = reason
            continue
        for path, form in forms.items():
            assert not isinstance(form, str)
            written.update({f"{start}{path}.{part}": tensor for part, tensor in form.items()})
    return OtherTensors(written, left_out)


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
    whole = to_comfyui(others, family)
    return OtherTensors({**cut.tensors, **whole.tensors}, whole.left_out)


def _pieces(name: str, factors: Factors, family: FamilyNames) -> dict[str, Factors] | str:
    """Return the factors of each part of a module by its path in diffusers, or why there are none."""
    path, parts = module_path(name, family), parts_of(name, family)
    if path is None:
        return "no known model has a module with this name"
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


def _cut(factors: Factors, parts: list[tuple[str, WeightPart]]) -> dict[str, Factors] | str:
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


def texts_to_diffusers(tensors: Mapping[str, Tensor]) -> OtherTensors:
    """`lora_te1_text_model_...` -> `text_encoder.text_model. ... .lora_A/lora_B.weight`, as diffusers has it.

    CLIP-L is `text_encoder`, T5 `text_encoder_2`. Encoders that no pipeline of diffusers takes LoRAs for are
    left out.
    """
    written: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, factors in group_by_module(tensors).items():
        path = diffusers_path_of_text(name)
        form = "diffusers has no such text encoder" if path is None else in_diffusers(_folded(factors))
        if isinstance(form, str):
            left_out[name] = form
        else:
            written.update({f"{path}.{part}": tensor for part, tensor in form.items()})
    return OtherTensors(written, left_out)
