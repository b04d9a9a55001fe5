"""Gradient checkpointing: trade compute and host memory for activation memory, from outside the network."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from modules.contract.family import DitSpec
from modules.offload.activations import Offload

# prefixes of the names of attention operators, torch's and those of the optional packages
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",  # also _for_cpu
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "xformers_flash::flash_fwd",
    "xformers_flash3::flash_fwd",
    "xformers::efficient_attention_forward",
    "planned::attention",  # in dry runs
)
# attention without a kernel: on a CPU, for few tokens
WRITTEN_OUT = ("aten::bmm", "aten::_softmax", "aten::_safe_softmax")
# attention to fewer keys than a quarter of the queries is cheap compared with the memory of its result
SHORT = 4


@dataclass(frozen=True)
class _Block:
    """The forward of one checkpointed block."""

    module: nn.Module
    forward: Callable[..., Tensor]
    keeps_attention: bool
    offload: Offload | None
    is_first: bool

    def __call__(self, *inputs: Any) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*inputs)
        if self.offload is not None and self.is_first:
            self.offload.begin()
        # autograd does not keep results that need no gradient, and compiled code may then overwrite them
        keeps = self.keeps_attention and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        contexts = reuse_attention if keeps else noop_context_fn
        kept: AbstractContextManager[object] = nullcontext() if self.offload is None else self.offload.hooks()
        with kept:
            return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=contexts)


def checkpoint_blocks(
    dit: nn.Module, spec: DitSpec, keep_attention: bool = False, offload: Offload | None = None
) -> None:
    """Make every block keep only its inputs, and recompute its activations in the backward pass.

    keep_attention: also keep the result of self-attention, so that its kernel runs once. offload: keeps the
    tensors that are direct arguments of a block; those of the last block stay on the device, as they are
    needed next. Has an effect in train mode with gradients on only. Call after LoRA and compilation: it wraps
    the `forward` that a block has then.
    """
    blocks = list(chain.from_iterable(spec.blocks(dit).values()))
    for index, block in enumerate(blocks):
        place = None if block is blocks[-1] else offload
        block.forward = _Block(block, block.forward, keep_attention, place, is_first=index == 0)


def reuse_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of computing and recomputing a block; the second reuses attention's results."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: SelectiveCheckpointContext, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    """Keep the result of an expensive attention, by the operator's name and the size of query and key."""
    name, tensors = operator.name(), (*inputs, *named.values())
    if name.startswith(ATTENTION):
        keeps = "backward" not in name and tensors[1].numel() * SHORT >= tensors[0].numel()
    else:
        keeps = name.startswith(WRITTEN_OUT) and tensors[0].device.type == "cpu"
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
