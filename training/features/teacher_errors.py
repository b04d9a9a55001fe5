"""Compare the magnitude and the direction of two predictions separately."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Weights of the magnitude error and of the color error in the comparison with a teacher's output."""

    size_weight: float
    color_weight: float


EVEN_SPLIT = Split(1.0, 1.0)


def magnitude_direction_errors(output: Tensor, target: Tensor, split: Split, has_channels: bool) -> Tensor:
    """Return the error of each sample, B: the sum of errors of magnitude and of direction.

    With r = output - target, p' = output - (1 - sqrt(color_weight)) * (mean of r of each channel), N
    elements in a sample, and |p'| without gradient in the second term:

        (size_weight * (|p'| - |target|)^2 + 2 |p'| |target| (1 - cos(p', target))) / N

    With weights of 1, the value is the mean squared difference, but the gradient differs: a prediction cannot
    lower its error by shrinking if its direction is uncertain. Source: the teacher matching of
    musubi-tuner's MiniMax-H3 training (docs/minimax_h3.md there).

    Args:
        output: The network's output, B C ... float32.
        target: The target, of the same shape.
        split: Weights of the magnitude error and of the color error.
        has_channels: Whether the second dimension is the channels of images; only these have a color weight.
    """
    if has_channels and split.color_weight != 1:
        differences = output - target
        means = differences.mean(dim=tuple(range(2, differences.ndim)), keepdim=True)
        output = output - (1 - split.color_weight**0.5) * means  # p' above
    flat = output.flatten(1)
    flat_target = target.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    target_norm = torch.linalg.vector_norm(flat_target, dim=1)
    cosine = torch.nn.functional.cosine_similarity(flat, flat_target, dim=1)
    magnitude_errors = (norm - target_norm).square()
    direction_errors = 2 * norm.detach() * target_norm * (1 - cosine)
    return (split.size_weight * magnitude_errors + direction_errors) / flat.shape[1]
