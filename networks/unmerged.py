"""Put LoRAs round layers whose weights stay in 8 or 4 bits; in all other layers LoRAs are merged."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as functional
from torch import nn

from networks.added import AddedLayer, AddedPart, ChangedPlace
from networks.apply import Change
from networks.deltas import OFT


def add_unmerged(
    dit: nn.Module, changes: Mapping[str, Sequence[Change]], device: torch.device, dtype: torch.dtype
) -> None:
    """Put changes of quantised weights round their layers, switched on. Call before networks and compilation.

    changes: `LoraPatch.unmerged`. dtype: to compute in.
    """
    for name, weight_changes in changes.items():
        place = ChangedPlace(name, dit.get_submodule(name.removesuffix(".weight")))
        height = len(place.shaped)
        parts = [AddedPart(place, change.factors, change.use.multiplier) for change in weight_changes]
        for part, change in zip(parts, weight_changes, strict=True):
            if OFT in change.factors:
                part.rows = change.rows
            elif change.rows is not None:  # add to some of the outputs only
                around = (change.rows.start, height - change.rows.stop)
                part.region = partial(functional.pad, pad=around)
        layer = AddedLayer(place, parts)
        layer.attach()
        layer.switch_on(device, dtype)
