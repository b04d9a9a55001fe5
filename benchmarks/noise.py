"""Give networks that were loaded from empty files random weights."""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from protocols.loading import Placement

SPREAD = 0.02  # standard deviation of the weights


@torch.no_grad()
def fill_with_noise(network: nn.Module, seed: int = 0) -> None:
    """Replace all parameters, on any device, by small random numbers.

    Products of zeros would run faster than real ones. fp8 weights get numbers over most of their range; their
    scales are set so that the products stay small.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in network.parameters():
        values = parameter.data
        generator = generators.setdefault(values.device, torch.Generator(values.device).manual_seed(seed))
        if values.dtype.itemsize > 1:
            values.normal_(0, SPREAD, generator=generator)
            continue
        for part in values.view(-1).split(1 << 26):
            part.copy_(torch.randn(part.shape, generator=generator, device=part.device).mul_(100))
    for name, buffer in network.named_buffers():
        if name.endswith("scale_weight"):
            buffer.fill_(SPREAD / 100)


@dataclass(frozen=True)
class NoisyFamily:
    """A family whose transformer is loaded with random weights in place of those in its file.

    They are drawn where a LoRA would be merged: on the device, before rounding to 8 bits and before weights
    go to the host. So runs with other options start from equal weights, and no host draws gigabytes.
    """

    family: Any

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer of an expert as the family does."""
        dit: nn.Module = self.family.load_dit(replace(placement, patch=draw_weight), expert)
        return dit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


def draw_weight(name: str, weight: Tensor, target: torch.dtype) -> Tensor:
    """Return random numbers in place of a weight: the same for a name on a kind of device.

    `target` is the dtype that the weight is rounded to. The standard deviation is that of common initial
    weights, the inverse root of a row's length, so that a signal neither vanishes nor grows from block to
    block. Scales of norms are about 1.
    """
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if weight.ndim < 2:
        values.normal_(0 if name.endswith("bias") else 1, SPREAD, generator=generator)
    else:
        values.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
    return values.to(weight.dtype).to(target)
