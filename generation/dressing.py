"""How the network of a generation is loaded, and what the options put around it."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from generation.options import GenerationOptions
from modules.contract.family import Family
from modules.contract.loading import Placement
from modules.dressing import dress, swapped_weights
from modules.errors import OptionError
from modules.fp8.products import add_product
from networks.merge import LoraPatch, LoraUse
from networks.switching import OriginalWeights


def dit_loader(
    family: Family,
    uses: Sequence[LoraUse],
    device: torch.device,
    options: GenerationOptions,
    originals: OriginalWeights | None = None,
) -> Callable[[int], nn.Module]:
    """expert -> its network on the device, the LoRAs merged; blocks compiled and swapped as the options say.

    originals: notes the weights while they are loaded, in place of merging. Raises OptionError.
    """
    speed = options.speed
    fp8 = add_product(speed.fp8.quantisation, device)

    def load_dit(expert: int) -> nn.Module:
        patch = originals or (LoraPatch(uses) if uses else None)
        host = swapped_weights(family.dit, speed.swap, device)
        placement = Placement(device, attention=speed.attention.choice, patch=patch, fp8=fp8, host=host)
        dit = family.load_dit(placement, expert)
        if patch is not None:
            patch.check()
        count = sum(map(len, family.dit.blocks(dit).values()))
        check_skipped_layers(options.guidance.skipped_layers, count)  # where no header has told it before
        dit.eval().requires_grad_(False)
        dress(dit, family.dit, device, speed.compilation.choice, host)
        return dit

    return load_dit


def check_skipped_layers(layers: frozenset[int], count: int) -> None:
    """Raise OptionError where skip-layer guidance names blocks that a network of so many does not have."""
    if layers and max(layers) >= count:
        raise OptionError(
            f"--slg_layers: there is no block {max(layers)}, the model has blocks 0 to {count - 1}"
        )
