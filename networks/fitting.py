"""Find out from headers whether LoRAs fit a model, before any of it is loaded."""

from collections.abc import Sequence
from pathlib import Path

import torch

from modules.checkpoints.opening import open_checkpoint
from networks.merge import LoraPatch, LoraUse

_META = torch.device("meta")


def check_loras_fit(model: Path, uses: Sequence[LoraUse]) -> None:
    """Compare names and shapes of LoRAs with the header of a transformer's file.

    Raises CheckpointError if a LoRA has another size, or if no part of it has a weight.
    """
    if not uses:
        return
    with open_checkpoint(model) as checkpoint:
        patch = LoraPatch(uses, checkpoint.tensors, model)
        for name, info in checkpoint.tensors.items():
            patch.add_to(name, torch.empty(info.shape, dtype=info.dtype, device=_META))
    patch.refuse_misfits()


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return how large a LoRA of this rank for a model is at least, from the header of its file.

    It counts the matrices of the blocks with one byte a number: a LoRA has two or four, but leaves some out.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)
