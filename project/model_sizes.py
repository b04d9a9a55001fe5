"""Compute sizes of released models, and whether they fit a GPU. No torch, because pages use it too."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from downloads.catalogue import Component, ModelSet
from modules.pages.language import say

SLOW = say("Slow on a CPU")
IN_USE = 2  # GiB for activations, LoRA and optimizer
# GiB in addition to weights in int8: with less, docs/small_cards.md has nf4
GIB_BESIDES_INT8_WEIGHTS = 4.2
INT8, NF4 = "--convrot_int8", "--nf4_base"
FP8 = {"--fp8_base", "--fp8_scaled"}


def needs_image(model: ModelSet) -> bool:
    """Return whether generation with the model needs an image to edit."""
    return "--control_image_path" in model.commands["generate"].split()


def transformer_bytes(model: ModelSet) -> int:
    """Return the total size in bytes of the transformers that a training run loads; 0 if unknown."""
    return sum(part.trained_bytes or part.size_bytes or 0 for part in list_transformers(model))


def list_transformers(model: ModelSet) -> list[Component]:
    """Return the model files with the trained network, or the checkpoint with all networks."""
    return [part for part in model.components if part.role.startswith("transformer") or part.trained_bytes]


def is_small(model: ModelSet, memory: float) -> bool:
    """Return whether the released transformer leaves half of `memory` GiB of GPU memory free.

    A training step needs less; samples need that much, because the VAE decodes them while the network stays
    on the GPU. For SDXL at 1024x1024, --plan shows 6.2 GiB for a step at rank 16. A sample needs 5.3 GiB for
    the network, its LoRA and the optimizer, and 3.3 GiB for the VAE: too much for 8 GiB, unless weights are
    in 8 bits (2.1 GiB less).
    """
    return transformer_bytes(model) <= memory / 2 * 2**30


def weight_options(model: ModelSet, memory: float) -> list[str]:
    """Return the options for weights in fewer bits that make the trained network fit into `memory` GiB.

    The weights are in int8, which is closer to 16 bits than fp8 and needs no fp8 units, or in nf4 if int8
    does not fit. Source: the table of docs/small_cards.md.
    """
    if not memory or is_small(model, memory):
        return []
    argv = shlex.split(model.properties["fp8"])
    # the model's own options do not quantize
    if not FP8 & {*argv}:
        return argv
    # if there are two transformers, only the active one is on the GPU
    networks = len(list_transformers(model)) if "--offload_inactive_dit" in argv else 1
    bytes_in_int8 = transformer_bytes(model) / networks / 2  # the file has 16 bits
    size_in_int8 = bytes_in_int8 / 2**30  # GiB
    weights = INT8 if size_in_int8 + GIB_BESIDES_INT8_WEIGHTS <= memory else NF4
    other_options = [word for word in argv if word not in FP8]
    return [weights, *other_options]


def find_smaller(model: ModelSet, models: Sequence[ModelSet], memory: float) -> list[ModelSet]:
    """Return smaller models of the family for the same task type, if this one does not fit the GPU.

    Smaller models are at most half as large. Returns [] if this model fits into `memory` GiB in 8 bits.
    """
    if not memory or is_small(model, memory) or _estimate_missing_memory(model, memory) <= 0:
        return []
    return [
        other
        for other in models
        if other.family == model.family
        and transformer_bytes(other) <= transformer_bytes(model) / 2
        and other.properties.get("from_image", False) == model.properties.get("from_image", False)
        and other.properties["frames"] == model.properties["frames"]
        and needs_image(other) == needs_image(model)
    ]


def describe_fit(model: ModelSet, memory: float) -> str:
    """Return a text on whether a model can be trained in `memory` GiB of GPU memory, judged by its size."""
    if not memory:
        return SLOW
    if is_small(model, memory):
        return say("fits")
    left = _estimate_missing_memory(model, memory)
    if left <= 0:
        return say("fits in 8 bits")
    if not model.properties.get("swaps", True):
        return say("does not fit")
    return say("in 8 bits, %(left)s GiB in RAM", left=f"{left:.0f}")


def _estimate_missing_memory(model: ModelSet, memory: float) -> float:
    """Return by how many GiB the 8-bit network exceeds `memory` GiB of GPU memory; negative if it fits."""
    is_in_8_bits = not model.properties["fp8"]  # the released file itself has 8 bits
    size = transformer_bytes(model) / (1 if is_in_8_bits else 2)
    return size / 2**30 - max(memory - IN_USE, 0)


def find_memory() -> float:
    """Return the memory of this machine's smallest NVIDIA GPU in GiB, from the driver; 0 without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0.0
    words = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    output = subprocess.run(words, capture_output=True, text=True, errors="replace").stdout
    sizes = [int(line) / 1024 for line in output.split() if line.isdecimal()]
    return min(sizes, default=0.0)
