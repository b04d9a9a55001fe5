"""How the network of a run is loaded, and what the options put around it."""

import torch
from torch import nn

from modules import dressing
from modules.compile_options import Compilation
from modules.contract.family import DitSpec
from modules.contract.loading import Placement
from modules.fp8.options import Quantisation
from modules.offload.block_swap import HostWeights
from training.loop_options import LoopOptions
from training.options import TrainingOptions

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision


def placement_of(options: TrainingOptions, device: torch.device, fp8: Quantisation | None) -> Placement:
    """Where the DiT goes and what it is kept in: the frozen one as its file is, one that is to learn in the
    dtype to learn in.
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
    """Compile the blocks, checkpoint them, and have swapped ones come from the host. For after a LoRA was
    attached.

    Where blocks' inputs go to the host, memory is short, and feed-forwards are computed in pieces too.
    """
    on_host, checkpointing = loop.gradient_checkpointing_cpu_offload, None
    if loop.gradient_checkpointing:
        checkpointing = dressing.Checkpointing(loop.gradient_checkpointing_keep is not None, on_host)
    dressing.dress(dit, spec, device, compilation, host, checkpointing, in_pieces=on_host)
    dit.train(loop.gradient_checkpointing)  # it has no dropout; checkpointing is what acts in training mode
