"""Merge LoRAs of Stable Diffusion into a single-file checkpoint, or into one LoRA."""

import torch

from networks.combining import add_up, save_sum
from networks.image_tools_options import WholeMergeOptions
from networks.loading import read_lora
from networks.merge import LoraUse
from networks.merge_files import merge_into_file
from networks.merging_flux import DTYPES


def merge_whole(options: WholeMergeOptions) -> None:
    """Write the merged checkpoint, or the merged LoRA if no checkpoint is given.

    Raises CheckpointError if a file cannot be used or fits nothing.
    """
    cpu = torch.device("cpu")
    loras = [read_lora(path, with_texts=True) for path in options.models]
    dtype = None if options.save_precision is None else DTYPES[options.save_precision]
    if options.sd_model is None:
        tensors = add_up(loras, options.ratios, options.concat, dtype or DTYPES[options.precision], cpu)
        save_sum(options.save_to, tensors, loras, options.ratios, options.no_metadata)
        return
    uses = [LoraUse(lora, ratio) for lora, ratio in zip(loras, options.ratios, strict=True)]
    merge_into_file(options.sd_model, uses, options.save_to, cpu, dtype=dtype, option="--save_to")
