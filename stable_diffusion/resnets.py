"""Norms and residual blocks of diffusers' U-Net, with fewer kernels and less memory.

Every block applies SiLU to the same embedded time and divides its output by 1. A fast GPU waits for the host
to start such kernels, twice in training with checkpointing. Here SiLU is applied once, by a module that the
U-Net has a place for, and the division by 1 is left out; results are bit-identical.

CUDA's autocast computes norms in float32 with copies of their inputs, which the backward pass keeps: a tenth
of a step's memory without checkpointing. torch's kernels compute norms of 16 bits in float32 and round the
result, as the layer after a norm would. After a norm of a residual block, SiLU gets rounded values, as on
a CPU.
"""
# Letters: B images, C channels, H W their size, E width of the embedded time

from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def use_fewer_kernels(unet: Any) -> None:
    """Make a U-Net start fewer GPU kernels: apply SiLU to the time embedding once, and run norms in 16 bits.

    Args:
        unet: A diffusers U-Net built by `unet_class`; blocks with other settings are not changed.
    """
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.forward = MethodType(_run_norm, module)  # type: ignore[method-assign]
    blocks = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    # all blocks must be changed together, because they share the activated time embedding
    if unet.time_embed_act is not None or not all(_is_plain(block) for block in blocks):
        return
    unet.time_embed_act = nn.SiLU()
    for block in blocks:
        block.skip_time_act = True
        block.forward = MethodType(_run_block, block)


def _is_plain(block: Any) -> bool:
    """Return whether a residual block has the settings used in Stable Diffusion's U-Nets."""
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and block.output_scale_factor == 1
    )


def _run_norm(norm: Any, x: Tensor) -> Tensor:
    """Normalize x. The result keeps the dtype of x, even under autocast, if the weights have this dtype."""
    keeps_dtype = x.dtype == norm.weight.dtype
    with torch.autocast(x.device.type, enabled=False) if keeps_dtype else nullcontext():
        output: Tensor = type(norm).forward(norm, x)
        return output


def _run_block(block: Any, x: Tensor, time: Tensor) -> Tensor:
    """Run a residual block on x, B C' H W, and SiLU of the time embedding, B E; return B C H W."""
    hidden = block.conv1(block.nonlinearity(block.norm1(x)))
    hidden = hidden + block.time_emb_proj(time)[:, :, None, None]
    hidden = block.dropout(block.nonlinearity(block.norm2(hidden)))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    # last, because recomputing a block stops before the last layer
    output: Tensor = x + block.conv2(hidden)
    return output
