"""The random numbers of one request."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.devices import send_ahead


class SeededNoise:
    """Random generator of one request, continued by every draw.

    By default it runs on the device, and its stream depends on the kind of device. With `cpu_noise` it runs
    on the CPU: the stream of `torch.manual_seed(seed)`, the same on every machine and in ComfyUI.
    """

    def __init__(self, seed: int, device: torch.device, cpu_noise: bool = False) -> None:
        self._device = device
        self._generator = torch.Generator(device="cpu" if cpu_noise else device).manual_seed(seed)

    def draw(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw standard normal numbers of this shape; they lie on the device."""
        drawn = torch.randn(*shape, generator=self._generator, device=self._generator.device, dtype=dtype)
        return send_ahead(drawn, self._device)  # solvers draw between steps, and must not wait there
