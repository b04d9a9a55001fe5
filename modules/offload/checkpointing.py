"""Trading compute and host memory for activation memory, applied to a network from outside."""

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

# beginnings of the names of attention's operators, torch's and those of the packages that it may be computed
# by
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
    "planned::attention",  # of rehearsals
)
# attention without a kernel: on a CPU, for few tokens
WRITTEN_OUT = ("aten::bmm", "aten::_softmax", "aten::_safe_softmax")
SHORT = 4  # attention to fewer keys than a quarter of the queries costs little beside what keeping it takes


@dataclass(frozen=True)
class _Block:
    """How one block is run."""

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
        # what needs no gradient here is not kept by autograd either, and compiled code may then write over it
        keeps = self.keeps_attention and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        )
        contexts = keeping_attention if keeps else noop_context_fn
        kept: AbstractContextManager[object] = nullcontext() if self.offload is None else self.offload.hooks()
        with kept:
            return checkpoint(self.forward, *inputs, use_reentrant=False, context_fn=contexts)


def checkpoint_blocks(
    dit: nn.Module, spec: DitSpec, keep_attention: bool = False, offload: Offload | None = None
) -> None:
    """Have every block keep only its inputs and compute its inside again in the backward pass.

    keep_attention: the result of self-attention is kept too and its kernel runs once. offload: where the
    inputs wait, those tensors that a block is given by themselves; the last block's stay, as they are needed
    next. Takes effect in train mode with gradients on; otherwise blocks run as before. Apply it after LoRA
    and compilation: it wraps whatever `forward` a block has at that time.
    """
    blocks = list(chain.from_iterable(spec.blocks(dit).values()))
    for index, block in enumerate(blocks):
        place = None if block is blocks[-1] else offload
        block.forward = _Block(block, block.forward, keep_attention, place, is_first=index == 0)


def keeping_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a first and a second computation, of which the second takes attention's results from
    the first.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: SelectiveCheckpointContext, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    """Keep what an attention that is dear returns; by the operator's name, and by query and key, which stand
    first.
    """
    name, tensors = operator.name(), (*inputs, *named.values())
    if name.startswith(ATTENTION):
        keeps = "backward" not in name and tensors[1].numel() * SHORT >= tensors[0].numel()
    else:
        keeps = name.startswith(WRITTEN_OUT) and tensors[0].device.type == "cpu"
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
