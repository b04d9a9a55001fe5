"""Merge LoRAs of FLUX into its transformer and its text encoders, file by file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import getLogger

import torch

from networks.combining import add_up, save_sum
from networks.image_tools_options import FluxMergeOptions
from networks.key_formats import OURS
from networks.loading import LoraFile, read_lora
from networks.lora_network import prefix_of
from networks.merge import LoraUse
from networks.merge_files import merge_into_file

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
    parts = {option: uses_of(loras, ratios, ENCODERS.get(option)) for option in outputs}
    for option, uses in parts.items():
        if uses and option not in options.targets:
            logger.warning(
                f"{len(uses)} of the LoRAs change {option[2:]} too, which is left out: no {option} is given"
            )
    for option, model in options.targets.items():
        written_by, output = outputs[option]
        assert output is not None
        merge_into_file(model, parts[option], output, device, dtype=dtype, option=written_by)


def uses_of(loras: Sequence[LoraFile], ratios: Sequence[float], prefix: str | None) -> list[LoraUse]:
    """Return what LoRAs change in the DiT, or in the text encoder of a prefix, as uses for its file."""
    uses = []
    for lora, ratio in zip(loras, ratios, strict=True):
        part = lora if prefix is None else text_part(lora, prefix)
        if part.tensors:
            uses.append(LoraUse(part, ratio))
    return uses


def text_part(lora: LoraFile, prefix: str) -> LoraFile:
    """Return the part of a LoRA that changes the text encoder with this prefix, as a LoRA for its file."""
    tensors = {
        OURS + name.removeprefix(f"{prefix}_"): tensor
        for name, tensor in lora.text_tensors.items()
        if prefix_of(name) == prefix
    }
    return replace(lora, tensors=tensors, text_tensors={}, metadata=_without_family(lora.metadata))


def _without_family(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata that say nothing of the DiT that a LoRA is for."""
    return {key: value for key, value in metadata.items() if not key.startswith(("ss_base", "modelspec"))}
