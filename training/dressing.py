"""Load the DiT of a run and wrap it; the order is always the same."""

import torch
from torch import nn

from modules.compile import compile_blocks
from modules.compile_options import Compilation
from modules.contract.family import DitSpec
from modules.contract.loading import Placement
from modules.fp8.options import Quantisation
from modules.offload.activations import offload_to_host
from modules.offload.block_swap import HostWeights, swap_blocks
from modules.offload.checkpointing import checkpoint_blocks
from modules.offload.token_pieces import compute_in_pieces
from training.loop_options import LoopOptions
from training.options import TrainingOptions

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision


def placement_of(options: TrainingOptions, device: torch.device, fp8: Quantisation | None) -> Placement:
    """Return where the DiT goes and its dtype.

    A frozen DiT keeps the file's dtype; a trained one is kept in bf16 (--full_bf16) or float32.
    """
    whole = options.whole_dit
    return Placement(
        device,
        storage_dtype=None if whole is None else torch.bfloat16 if whole.full_bf16 else torch.float32,
        fp8_compute_dtype=torch.float16 if options.accelerator.mixed_precision == "fp16" else None,
        attention=options.speed.attention.choice,
        fp8=fp8,
    )


def dress(
    dit: nn.Module,
    spec: DitSpec,
    loop: LoopOptions,
    device: torch.device,
    compilation: Compilation | None = None,
    host: HostWeights | None = None,
) -> None:
    """Compile the blocks, checkpoint them, and set up block swap. Call it after a LoRA was attached.

    If the blocks' inputs are kept on the host, memory is short, so feed-forwards are computed in pieces too.
    """
    if loop.gradient_checkpointing_cpu_offload:
        compute_in_pieces(dit, spec)
    if compilation is not None:
        compile_blocks(dit, spec, compilation)
    if loop.gradient_checkpointing:
        offload = offload_to_host(device) if loop.gradient_checkpointing_cpu_offload else None
        checkpoint_blocks(dit, spec, loop.gradient_checkpointing_keep is not None, offload)
    swap_blocks(dit, host, device)
    dit.train(loop.gradient_checkpointing)  # it has no dropout; training mode only turns checkpointing on
