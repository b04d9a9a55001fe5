"""Fill networks from empty files with random weights."""

import torch
from torch import nn

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
