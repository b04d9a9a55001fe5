"""Trading compute for activation memory, applied to a network from outside."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.family import DitSpec


def checkpoint_blocks(dit: nn.Module, spec: DitSpec) -> None:
    """Have every block keep only its inputs and compute its inside again in the backward pass.

    Takes effect in train mode with gradients on; otherwise blocks run as before. Apply it after LoRA and compilation: it wraps
    whatever `forward` a block has at that time.
    """
    for name in spec.block_lists:
        for block in dit.get_submodule(name).children():
            block.forward = functools.partial(_run_block, block, block.forward)


def _run_block(block: nn.Module, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)
