"""Convert DoRA magnitudes to ComfyUI's norms and back."""

from logging import getLogger

import torch
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks.apply import Change
from networks.baking import Baking, Weights, open_weights, read_module_weight, replace_factors
from networks.delta import read_delta
from networks.formats.comfyui import FROZEN_NORMS, NORMS_FORM
from networks.kinds.algebra import compute_norms, is_by_input
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import Factors
from networks.loading import LoraFile, WeightedLora
from networks.module_factors import group_by_module
from networks.names.layouts import FamilyNames
from networks.writing import convert_to_our_layout

logger = getLogger(__name__)


@torch.no_grad()
def convert_to_norms(
    lora: LoraFile, family: FamilyNames | None, baking: Baking | None, are_frozen: bool, target: str
) -> LoraFile:
    """Convert a DoRA's row magnitudes between the norms of frozen and of changed weights.

    ComfyUI divides by the norms of the frozen weights W; training divides by the norms of W + dW. The
    conversion m' = m * |W| / |W + dW|, row by row, is exact, and the metadata records which norms apply.
    Other LoRAs are returned unchanged.

    Args:
        lora: The LoRA.
        family: Names of the model's modules.
        baking: The model whose weights W are read; None if none is given.
        are_frozen: Convert to the norms of the frozen weights (True) or of the changed weights (False).
        target: Value of --target, for messages.

    Raises:
        OptionError: If a model is given although there is nothing to convert.
        CheckpointError: If a model is needed but missing, or does not fit.
    """
    tensors = {**lora.tensors, **lora.text_tensors}
    magnitudes = [tensor for name, tensor in tensors.items() if name.endswith(MAGNITUDES)]
    is_dora_by_output = any(not is_by_input(tensor) for tensor in magnitudes)
    has_target_norms = lora.has_frozen_norms == are_frozen
    if is_dora_by_output and not has_target_norms:
        if baking is None:
            # A DoRA without converting it; warn or raise if the target reads its magnitudes differently
            if target == "default":
                return lora
            if lora.has_frozen_norms:
                raise CheckpointError(
                    f"{lora.path} is a DoRA in ComfyUI's form, which other programs read differently.\n"
                    "  Add --dit with the model's file, followed by the files of the text encoders that it "
                    "changes.",
                    lora.path,
                )
            logger.warning(
                f"{lora.path} is a DoRA: ComfyUI divides its magnitudes by other norms, so its effect there "
                "differs by 3 to 24 %. Add --dit with the model that it was trained for to convert it exactly"
            )
            return lora
        return _convert_norms(lora, family, baking, are_frozen)
    if baking is not None:
        reason = "already has this form" if is_dora_by_output else "has no DoRA magnitudes by output"
        raise OptionError(f"--dit: {lora.path} {reason}, so --target {target} needs no model. Omit --dit")
    return lora


def _convert_norms(lora: LoraFile, family: FamilyNames | None, baking: Baking, are_frozen: bool) -> LoraFile:
    """Convert magnitudes to the norms of the frozen weights (`are_frozen`), or of the changed weights."""
    tensors = lora.tensors if family is None else convert_to_our_layout(lora.tensors, family)
    modules = group_by_module({**tensors, **lora.text_tensors})
    with open_weights(baking.models, family) as weights:
        for name, factors in modules.items():
            if MAGNITUDES not in factors or is_by_input(factors[MAGNITUDES]):
                continue
            # |W| / |W + change|, row by row
            ratio = _compute_norm_ratio(name, factors, lora=lora, weights=weights, device=baking.device)
            # the result stays float32, because rounding it to 16 bits would make the conversion inexact
            magnitudes = factors[MAGNITUDES].float().reshape(ratio.shape)
            converted = magnitudes * ratio if are_frozen else magnitudes / ratio
            modules[name] = {**factors, MAGNITUDES: converted}
    metadata = {key: value for key, value in lora.metadata.items() if key != NORMS_FORM}
    if are_frozen:
        metadata[NORMS_FORM] = FROZEN_NORMS
    return replace_factors(lora, modules, metadata)


def _compute_norm_ratio(
    name: str, factors: Factors, lora: LoraFile, weights: Weights, device: torch.device
) -> Tensor:
    """Return |W| / |W + change| for each row of the frozen weight W, on the CPU."""
    delta = read_delta(factors)
    change = delta.compute_change(device)
    assert change is not None
    weight, path = read_module_weight(name, len(change), lora, weights)
    # raises CheckpointError if shapes differ
    Change(WeightedLora(lora), delta).fit(None, weight, name, str(path))
    frozen = weight.to(device, torch.float32)
    changed = frozen + change.reshape(frozen.shape)
    return (compute_norms(frozen) / compute_norms(changed)).cpu()
