"""Apply features to a loaded transformer, in the same order in training and generation.

Before it: weights are quantized and LoRAs merged while loading, and a LoRA that is trained is attached.
"""

from dataclasses import dataclass

import torch
from torch import nn

from modules.compile_options import Compilation
from protocols.family import DitSpec
from protocols.loading import BlockSharder
from runtime.offload.block_swap import swap_blocks
from runtime.offload.swap_plan import HostWeights, SwapPlan, host_weights
from runtime.options import SwapOptions


@dataclass(frozen=True)
class Checkpointing:
    """Settings for blocks that keep only their inputs for the backward pass (activation checkpointing)."""

    keeps_attention: bool = False
    inputs_on_host: bool = False


def make_host_weights(
    spec: DitSpec, swap: SwapOptions, device: torch.device, all_weights: bool = False
) -> HostWeights | None:
    """Return host memory for swapped weights, or None if no weights are swapped.

    Args:
        spec: Names of the network's blocks.
        swap: Options of block swap.
        device: Device of the run.
        all_weights: Whether to hold all weights, as for networks that take turns on one device.
    """
    if not (all_weights or swap.blocks_to_swap or swap.img_in_txt_in_offloading):
        return None
    plan = SwapPlan(spec, swap.number, swap.img_in_txt_in_offloading, swap.block_swap_ring_size)
    return host_weights(plan, device, all_weights=all_weights)


def set_up_network(
    dit: nn.Module,
    spec: DitSpec,
    device: torch.device,
    compilation: Compilation | None = None,
    host_weights: HostWeights | None = None,
    checkpointing: Checkpointing | None = None,
    in_pieces: bool = False,
    block_sharder: BlockSharder | None = None,
) -> None:
    """Prepare a loaded network to run: computation in pieces, compilation, checkpointing, swap, sharding.

    Args:
        dit: The transformer.
        spec: Names of the network's blocks.
        device: Device of the run.
        compilation: How to compile; None does not compile.
        host_weights: Host memory that the network was loaded with.
        checkpointing: How to checkpoint; None keeps all activations.
        in_pieces: Whether token-wise parts are computed in pieces.
        block_sharder: Splits the blocks over processes; None keeps them complete.

    Raises:
        OptionError: If the network has fewer blocks than are to be swapped.
    """
    # each step wraps the `forward` that the steps before it have set; modules are imported only if used
    if in_pieces:
        from runtime.offload.checkpointing import compute_in_pieces

        compute_in_pieces(dit, spec)
    if compilation is not None:
        from runtime.compile import compile_blocks

        spec = compile_blocks(dit, spec, compilation)
    if checkpointing is not None:
        from runtime.offload.checkpointing import checkpoint_blocks, offload_to_host

        offload = offload_to_host(device) if checkpointing.inputs_on_host else None
        checkpoint_blocks(dit, spec, checkpointing.keeps_attention, offload)
    if host_weights is not None:
        swap_blocks(dit, host_weights, device)
    if block_sharder is not None:
        block_sharder.finish(dit)
