"""Load the network of a run, and put the options' features around it."""

import torch
from torch import nn

from modules import dressing
from modules.attention.attend import check_backend
from modules.compile_options import Compilation
from modules.contract.family import DitSpec, Family
from modules.contract.loading import Placement
from modules.devices import dtype_name
from modules.errors import OptionError
from modules.fp8.options import Quantisation
from modules.offload.block_swap import HostWeights
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
    on_host, checkpointing = loop.gradient_checkpointing_cpu_offload, None
    if loop.gradient_checkpointing:
        checkpointing = dressing.Checkpointing(loop.gradient_checkpointing_keep is not None, on_host)
    dressing.dress(dit, spec, device, compilation, host, checkpointing, in_pieces=on_host)
    dit.train(loop.gradient_checkpointing)  # it has no dropout; checkpointing is what acts in training mode


def dtype_of(dit: nn.Module) -> torch.dtype:
    """Return the dtype in which the DiT computes without autocast."""
    own = getattr(dit, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else next(dit.parameters()).dtype


def check_computing(
    family: Family, options: TrainingOptions, device: torch.device, fp8: Quantisation | None
) -> None:
    """Raise OptionError if the requested attention or precision is not available; nothing is loaded yet."""
    autocast = AUTOCAST.get(options.accelerator.mixed_precision)
    placement = placement_of(options, device, fp8)
    check_backend(
        placement.attention,
        placement.device,
        lambda: autocast or family.compute_dtype(placement),
        training=True,
    )
    if autocast is not None:
        check_dtype(family, options, family.compute_dtype(placement))


def check_dtype(family: Family, options: TrainingOptions, dtype: torch.dtype) -> None:
    """Raise OptionError if --mixed_precision does not go with the dtype that the model computes in."""
    precision = options.accelerator.mixed_precision
    autocast = AUTOCAST.get(precision)
    if autocast is None or dtype in {autocast, torch.float32}:
        return
    casts = f", or --dit_dtype {precision}" if hasattr(family.options, "dit_dtype") else ""
    raise OptionError(
        f"--mixed_precision {precision}: the model is {dtype_name(dtype)}. Use --mixed_precision no, or the "
        f"model's dtype{casts}."
    )
