"""Small layers that the networks of this room share."""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class StoredNorm(nn.Module):
    """Batch normalisation with the statistics of the file, as it is after training."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width, divided by the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2)
