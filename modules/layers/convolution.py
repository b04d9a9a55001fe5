"""Convolutions over clips: a 3D convolution that is fast on CPUs too, memory layouts, nearest upsampling.

With channels last, a frame or the last frames of a clip are one contiguous piece of memory, and convolutions
are faster on CPUs and CUDA devices.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import handle_torch_function, has_torch_function


def memory_formats(device: torch.device) -> tuple[torch.memory_format, torch.memory_format]:
    """Return the memory formats of clips (B C T H W) and of single frames (B C H W) for a device."""
    if device.type in {"cpu", "cuda"}:
        return torch.channels_last_3d, torch.channels_last
    return torch.contiguous_format, torch.contiguous_format


def cast_for_convolution(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a clip B C T H W or frames B C H W on a device, in its memory format, which all layers keep."""
    clip_format, frame_format = memory_formats(device)
    return x.to(device, dtype, memory_format=clip_format if x.ndim == 5 else frame_format)


def set_memory_format(module: nn.Module, device: torch.device) -> None:
    """Convert a module's convolution weights to the device's memory format: channels last on CPU and CUDA."""
    clip_layout, frame_layout = memory_formats(device)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            layout = clip_layout if isinstance(part, nn.Conv3d) else frame_layout
            part.weight.data = part.weight.data.contiguous(memory_format=layout)


def empty_clip(x: Tensor, *size: int) -> Tensor:
    """Return an uninitialized clip B C T H W of this size, with dtype, device and memory format like x."""
    layout = (
        torch.channels_last_3d
        if x.is_contiguous(memory_format=torch.channels_last_3d)
        else torch.contiguous_format
    )
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


# values of a result: beyond, CUDA's kernel for channels last leaves zeros, without an error
# (pytorch/pytorch#141831)
MAX_ELEMENTS = 2**31 - 1


def repeat_pixels(x: Tensor, factor: int, maximum: int = MAX_ELEMENTS) -> Tensor:
    """Repeat each pixel `factor` times in height and width: B C H W to B C fH fW, in the memory format of x.

    Torch's own kernel is used for results of up to `maximum` values.
    """
    if x.numel() * factor**2 <= maximum:
        return interpolate(x, scale_factor=float(factor), mode="nearest")
    batch, channels, height, width = x.shape
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    large = torch.empty(
        (batch, channels, height * factor, width * factor),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    )
    squares = large.unflatten(3, (width, factor)).unflatten(2, (height, factor))  # B C H f W f
    squares.copy_(x[:, :, :, None, :, None])
    return large


HAS_ONEDNN = torch.backends.mkldnn.is_available()


def conv3d(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """Compute nn.Conv3d.forward with zero padding, B C T H W to B C' T' H' W'.

    For a single clip whose product of channels, frames and rows is small, PyTorch selects a plain kernel that
    is three to ten times slower than oneDNN's, which this function uses.
    """
    padding = layer.padding
    assert not isinstance(padding, str)
    is_unsupported = x.device.type != "cpu" or x.dtype != torch.float32 or layer.weight.dtype != torch.float32
    if is_unsupported or not HAS_ONEDNN or torch.is_autocast_enabled("cpu"):
        return functional.conv3d(
            x,
            layer.weight,
            layer.bias,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )
    return torch.mkldnn_convolution(
        x, layer.weight, layer.bias, padding, layer.stride, layer.dilation, layer.groups
    )


Compute = Callable[[Tensor], Tensor]


def compute_piece(compute: Compute, piece: Tensor) -> Tensor:
    """Return `compute(piece)`; its result and memory must be proportional to the piece's last two axes."""
    if has_torch_function((piece,)):  # true while a mode such as `dry_run.LargestPieceMode` is active
        result: Tensor = handle_torch_function(compute_piece, (piece,), compute, piece)
        return result
    return compute(piece)
