"""Train DoRA magnitudes in a LoRA layer."""

import torch
from torch import Tensor, nn

from checkpoints.stored.forms import get_dequantized_weight
from networks.kinds import dora
from networks.kinds.contract import KindTraining
from networks.lora_layer import LoraLayer
from runtime.offload.sharding import gather_weight


def extend(layer: LoraLayer) -> None:
    """Add trainable magnitudes to a layer, initialized to the norms of the frozen weight's rows."""
    original = layer.original
    weight = get_dequantized_weight(original, gather_weight(original.weight))
    rows = weight.detach().flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).cpu()
    # out x 1, or out x 1 x 1 x 1 for a convolution
    layer.dora_scale = nn.Parameter(norms.view(-1, *[1] * (weight.ndim - 1)))
    layer.register_buffer("squares", norms.square(), persistent=False)
    layer.combine_outputs = decompose


def decompose(layer: LoraLayer, out: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output of the DoRA weight `magnitude * (W + change) / norm(W + change)`, with its bias.

    With r = magnitude / norm and multiplier 1, it is (out - bias) * r + bias + added * r. Gradients treat the
    norm as a constant: Liu et al. 2024, arXiv 2402.09353, section 4.3.

    Args:
        layer: The layer.
        out: Output of the frozen module, ... x out or B x out x H x W.
        added: Output of the LoRA times its multiplier, of the same shape.
        dtype: Dtype of the module's input.
    """
    magnitudes = layer.dora_scale
    assert isinstance(magnitudes, Tensor)
    ratio = magnitudes.flatten() / _compute_row_norms(layer, dtype)
    bias = layer.original.bias
    if isinstance(layer.original, nn.Conv2d):
        ratio = ratio.view(-1, 1, 1)
        bias = None if bias is None else bias.view(-1, 1, 1)
    without_bias = out if bias is None else out - bias.to(out.dtype)
    # the multiplier scales the difference from the frozen output: 0 changes nothing
    difference = without_bias * (layer.multiplier * (ratio - 1)).to(out.dtype)
    return out + difference + added * ratio.to(out.dtype)


@torch.no_grad()
def _compute_row_norms(layer: LoraLayer, dtype: torch.dtype) -> Tensor:
    """Return the row norms of W + change, float32, without computing the change."""
    # For a row w of W, a row b of the up factor, the down factor A, and s = alpha / rank: |w + s b A|^2 =
    # |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T.
    frozen_squares = layer.squares  # |w|^2
    assert isinstance(frozen_squares, Tensor)
    down = layer.lora_down.weight.flatten(1)
    up = layer.lora_up.weight.flatten(1)
    down_by_weight = _multiply_by_frozen_weight(layer, down, dtype)  # A W^T
    with torch.autocast(down.device.type, enabled=False):
        mixed = (up * down_by_weight.T).sum(1)  # b (A w)
        change_squares = ((up @ (down @ down.T)) * up).sum(1)  # b (A A^T) b^T
        squares = frozen_squares + 2 * layer.scale * mixed + layer.scale**2 * change_squares
        # rounding may make a square negative
        return squares.clamp(min=0).sqrt() + torch.finfo(torch.float32).eps  # as in LyCORIS


def _multiply_by_frozen_weight(layer: LoraLayer, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A W^T for the down factor A and the frozen weight W as float32, R x out."""
    # For a linear layer, the frozen module's forward computes it, because its weight may be quantized.
    # down: Down factor, R x in, or R x (in * kernel) for a convolution.
    original = layer.original
    if isinstance(original, nn.Conv2d):
        matrix = gather_weight(original.weight).flatten(1)
        return (down.to(matrix.dtype) @ matrix.T).float()
    out = layer.run_frozen(down.to(dtype)).float()  # A W^T + bias
    return out if original.bias is None else out - original.bias.float()


class DoraTraining(KindTraining):
    """Adds magnitudes to the layers of LoRAs."""

    kind = dora.DORA

    def extend_layer(self, layer: LoraLayer) -> None:
        """Add trainable magnitudes to a LoRA layer."""
        extend(layer)


DORA = DoraTraining()
