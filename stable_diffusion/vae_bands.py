"""Convolutions computed in bands of rows, so that a large picture needs less memory in the VAE.

Only the workspace of the convolutions shrinks; norms and attention see the whole picture, so that the result
is that without bands, but for the order of sums in the convolution itself.
"""
# Letters: B batch, C channels, H W size

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def band_convolutions(network: nn.Module, bands: int) -> None:
    """Let all convolutions of a network that look beyond one pixel work in bands, at most this many."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.forward = _in_bands(module, bands)  # type: ignore[method-assign, assignment]


def _in_bands(conv: nn.Conv2d, bands: int) -> Callable[[Tensor], Tensor]:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    above, beside = (int(size) for size in conv.padding)  # rows and columns of zeros

    def forward(x: Tensor) -> Tensor:
        # x: B C H W
        height = x.shape[2]
        rows = (height + 2 * above - kernel) // stride + 1  # of the result
        if rows < 2 * bands:
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        result: Tensor | None = None
        edges = [rows * band // bands for band in range(bands + 1)]
        for start, end in zip(edges, edges[1:], strict=False):
            first, last = start * stride - above, (end - 1) * stride - above + kernel
            band = x[:, :, max(0, first) : min(height, last)]
            if first < 0 or last > height:
                band = F.pad(band, (0, 0, max(0, -first), max(0, last - height)))
            made = F.conv2d(band, conv.weight, conv.bias, conv.stride, (0, beside))
            if result is None:
                result = made.new_empty((*made.shape[:2], rows, made.shape[3]))
                result = result.contiguous(memory_format=_format_of(x))
            result[:, :, start:end] = made
        assert result is not None
        return result

    return forward


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
