"""Parts of video VAEs that compute a clip in groups of frames: state between these, and the norm.

Source: the released VAEs of Wan2.1 (arXiv 2503.20314, section 4.1).
"""
# Letters: B batch, C channels

import torch
from torch import Tensor, nn

from modules.devices import empty_pinned


class FrameCache:
    """The last frames of the clip that each layer has seen so far. Use one for each clip."""

    def __init__(self, on_cpu: bool = False) -> None:
        self._on_cpu = on_cpu
        self._frames: dict[nn.Module, Tensor] = {}

    def get_frames(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """Return the last frames that a layer kept, on `device`; None at the beginning of the clip."""
        frames = self._frames.get(layer)
        return None if frames is None else frames.to(device, non_blocking=True)

    def store_frames(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy of `frames`, so that the tensor they are part of can be freed."""
        if not self._on_cpu:
            self._frames[layer] = frames.clone()
            return
        buffer = self._frames.get(layer)
        if buffer is None or buffer.shape != frames.shape:
            allocate = empty_pinned if frames.is_cuda else torch.empty
            buffer = allocate(frames.shape, dtype=frames.dtype)
        # both directions run in order on the device's current stream: the host never waits for a copy
        self._frames[layer] = buffer.copy_(frames, non_blocking=True)


class RmsNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels (not the root mean square with an epsilon)."""

    def __init__(self, width: int, spatial_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * spatial_axes))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalize x, B C ... `out` receives the result; None makes a new tensor."""
        # in 16 bits, rounding would scale all channels of a pixel wrongly
        exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact).clamp_min_(1e-12)
        out = torch.empty_like(x) if out is None else out
        return torch.mul(x, x.shape[1] ** 0.5 / length, out=out).mul_(self.gamma)
