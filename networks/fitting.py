"""Find out from headers whether LoRAs fit a model, before any of it is loaded."""

from collections.abc import Sequence
from pathlib import Path

import torch

from modules.checkpoints.dits import refuse_fp8_file
from modules.checkpoints.opening import open_checkpoint
from modules.fp8.options import Quantisation
from networks.merge import LoraPatch, LoraUse

_META = torch.device("meta")


def check_loras_fit(model: Path, uses: Sequence[LoraUse], fp8: Quantisation | None = None) -> None:
    """Compare names and shapes of LoRAs with the header of a transformer's file.

    fp8: how the model is to be kept. Raises CheckpointError if a LoRA has another size, if no part of it has
    a weight, or if it changes weights that are stored in fp8 and are to stay in it.
    """
    if not uses:
        return
    with open_checkpoint(model) as checkpoint:
        patch = LoraPatch(uses, checkpoint.tensors, model)
        for name, info in checkpoint.tensors.items():
            patch.add_to(name, torch.empty(info.shape, dtype=info.dtype, device=_META))
            if fp8 is not None and info.dtype.itemsize == 1 and patch.touches(name):
                refuse_fp8_file(model, fp8, has_loras=True)
    patch.refuse_misfits()


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return how large a LoRA of this rank for a model is at least, from the header of its file.

    It counts the matrices of the blocks with one byte a number: a LoRA has two or four, but leaves some out.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)
