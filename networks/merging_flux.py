"""Merge LoRAs of FLUX into its transformer and its text encoders, file by file."""

from dataclasses import replace
from logging import getLogger

import torch

from networks.combining import add_up, save_sum
from networks.image_tools_options import FluxMergeOptions
from networks.loading import read_lora
from networks.merge import LoraUse
from networks.merge_files import merge_into_file
from networks.text_loras import uses_for_text

logger = getLogger(__name__)
DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENCODERS = {"--clip_l": "lora_te1", "--t5xxl": "lora_te3"}  # option -> prefix of its part of a LoRA


def merge_flux(options: FluxMergeOptions) -> None:
    """Write the merged models, or the merged LoRA if no model is given.

    Raises CheckpointError if a file cannot be used or fits nothing, OptionError if a model has no part in any
    LoRA.
    """
    loras = [read_lora(path, with_texts=True) for path in options.models or ()]
    ratios = list(options.ratios or ())
    dtype = None if options.save_precision is None else DTYPES[options.save_precision]
    device = torch.device(options.working_device)
    if not options.into_models:
        assert options.save_to is not None
        tensors = add_up(loras, ratios, options.concat, dtype or DTYPES[options.precision], device)
        save_sum(options.save_to, tensors, loras, ratios, options.no_metadata)
        return
    outputs = {
        "--flux_model": ("--save_to", options.save_to),
        "--clip_l": ("--clip_l_save_to", options.clip_l_save_to),
        "--t5xxl": ("--t5xxl_save_to", options.t5xxl_save_to),
    }
    uses = [LoraUse(lora, ratio) for lora, ratio in zip(loras, ratios, strict=True)]
    parts = {option: uses_for_text(uses, prefix) for option, prefix in ENCODERS.items()}
    parts["--flux_model"] = [
        replace(use, lora=replace(use.lora, text_tensors={})) for use in uses if use.lora.tensors
    ]
    for option, found in parts.items():
        if found and option not in options.targets:
            logger.warning(
                f"{len(found)} of the LoRAs change {option[2:]} too, which is left out: no {option} is given"
            )
    for option, model in options.targets.items():
        written_by, output = outputs[option]
        assert output is not None
        merge_into_file(model, parts[option], output, device, dtype=dtype, option=written_by)
