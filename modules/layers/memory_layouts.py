"""Memory layouts of clips and frames.

With channels last, a frame or the last frames of a clip are one contiguous piece of memory, and convolutions
are faster on CPUs and CUDA devices.
"""

import torch
from torch import Tensor, nn


def layouts(device: torch.device) -> tuple[torch.memory_format, torch.memory_format]:
    """Return the memory layouts of clips (B C T H W) and of single frames (B C H W) for a device."""
    if device.type in {"cpu", "cuda"}:
        return torch.channels_last_3d, torch.channels_last
    return torch.contiguous_format, torch.contiguous_format


def lay_out(module: nn.Module, device: torch.device) -> None:
    """Convert the weights of a module's convolutions to the memory layouts for the device."""
    clip_layout, frame_layout = layouts(device)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            layout = clip_layout if isinstance(part, nn.Conv3d) else frame_layout
            part.weight.data = part.weight.data.contiguous(memory_format=layout)


def empty_clip(x: Tensor, *size: int) -> Tensor:
    """Return an uninitialised clip B C T H W of that size with the dtype, device and layout of the clip x."""
    layout = (
        torch.channels_last_3d
        if x.is_contiguous(memory_format=torch.channels_last_3d)
        else torch.contiguous_format
    )
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
