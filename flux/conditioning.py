"""What the transformer takes besides noisy latents, under the names of caches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from modules.contract.data import Conditions
from modules.devices import send

POOLED, STATES, MASK, GUIDANCE = "l_pooled", "t5_out", "t5_attn_mask", "guidance"
CHROMA_KEYS = frozenset({STATES, MASK})
FLUX_KEYS = CHROMA_KEYS | {POOLED}


def text_keys(has_pooled: bool) -> frozenset[str]:
    """Return the names of what the text encoders give."""
    return FLUX_KEYS if has_pooled else CHROMA_KEYS


def text_inputs(
    cond: Conditions, device: torch.device, has_pooled: bool, uses_mask: bool
) -> Mapping[str, Tensor]:
    """Return the conditions that a text gives, under the names of the network's arguments, on its device.

    uses_mask: padding behind the text is left out; else it counts as text.
    """
    names = {"t5": STATES}
    if has_pooled:
        names["pooled"] = POOLED
    if uses_mask:
        names["t5_mask"] = MASK
    found = {}
    for argument, name in names.items():
        value = cond[name]
        assert isinstance(value, Tensor)
        found[argument] = send(value, device)
    return found
