"""Load the networks of a generation, and put the options' features around them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from generation.experts import Check
from generation.options import GenerationOptions
from modules.contract.family import Family
from modules.contract.loading import Placement
from modules.devices import own_stream
from modules.dressing import dress, swapped_weights
from modules.errors import OptionError
from modules.fp8.options import Quantisation
from modules.fp8.products import add_product
from modules.offload.turns import HostCopy, HostPlaceOf
from networks.apply import LoraPatch, OriginalWeights
from networks.loading import LoraUse

LorasByExpert = Sequence[Sequence[LoraUse]]  # of each of `Family.experts`, in their order


@dataclass(frozen=True)
class DitLoader:
    """expert -> its network on the device, its LoRAs merged; blocks compiled and swapped as options say."""

    family: Family
    uses: LorasByExpert
    device: torch.device
    options: GenerationOptions
    fp8: Quantisation | None
    # by expert: notes the weights while they are loaded, in place of merging
    originals: Sequence[OriginalWeights] | None = None

    def __call__(self, expert: int) -> nn.Module:
        """Load an expert to the device. Raises OptionError."""
        return self._load(expert, None, None)

    def aside(self, expert: int, check: Check) -> tuple[nn.Module, HostCopy]:
        """Load an expert into host memory, with equal weights: they are computed on the device, one by one.

        Its copy brings it to the device. check: called for each tensor; may raise.
        """
        place = None
        if self.device.type != "cpu":
            swapped = swapped_weights(self.family.dit, self.options.speed.swap, self.device)
            place = HostPlaceOf(self.device, swapped)
        with own_stream(self.device):
            dit = self._load(expert, place, check)
            return dit, HostCopy(dit, self.device, place)

    def _load(self, expert: int, place: HostPlaceOf | None, check: Check | None) -> nn.Module:
        family, speed = self.family, self.options.speed
        uses = self.uses[expert] if self.uses else ()
        patch = self.originals[expert] if self.originals else (LoraPatch(uses) if uses else None)
        swapped = swapped_weights(family.dit, speed.swap, self.device) if place is None else place.swapped
        placement = Placement(
            self.device,
            attention=speed.attention.choice,
            patch=patch,
            fp8=self.fp8,
            host=place or swapped,
            check=check,
        )
        dit = family.load_dit(placement, expert)
        if patch is not None:
            patch.check()
        count = sum(map(len, family.dit.blocks(dit).values()))
        # where no header has told it before
        check_skipped_layers(self.options.guidance.skipped_layers, count)
        dit.eval().requires_grad_(False)
        dress(dit, family.dit, self.device, speed.compilation.choice, swapped)
        return dit


def dit_loader(
    family: Family,
    uses: LorasByExpert,
    device: torch.device,
    options: GenerationOptions,
    originals: Sequence[OriginalWeights] | None = None,
) -> DitLoader:
    """Make the loader of a family's experts.

    uses: by expert; empty: none has LoRAs. originals: by expert. Raises OptionError.
    """
    fp8 = add_product(options.speed.fp8.quantisation, device)
    return DitLoader(family, uses, device, options, fp8, originals)


def check_skipped_layers(layers: frozenset[int], count: int) -> None:
    """Raise OptionError where skip-layer guidance names blocks that a network of so many does not have."""
    if layers and max(layers) >= count:
        raise OptionError(
            f"--slg_layers: there is no block {max(layers)}, the model has blocks 0 to {count - 1}"
        )
