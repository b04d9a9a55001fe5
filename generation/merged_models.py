"""Write the transformer with LoRAs merged into it (--save_merged_model)."""

import logging
from pathlib import Path

import torch

from generation.network_setup import LorasByExpert
from modules.errors import OptionError
from modules.output_files import reject_replacing
from networks.apply import check_loras_fit
from networks.merging import merge_into_file
from protocols.family import Family

logger = logging.getLogger(__name__)


def save_merged_model(
    family: Family, loras_by_expert: LorasByExpert, path: Path, device: torch.device, rounding: str
) -> None:
    """Write the transformer with the LoRAs merged in, one file per expert.

    With several experts, the expert's name is appended to the file name (`_low_noise`), and an expert without
    LoRAs gets no file. All names and shapes are checked before the first file is written.

    Args:
        family: The model family.
        loras_by_expert: LoRA files by expert.
        path: Path of the file.
        device: Device of the run.
        rounding: Value of --lora_rounding.
    """
    files = family.dit_files
    has_several_experts = len(files) > 1
    # an expert without LoRAs is left out; a model with one expert is written even without LoRAs
    merged_indices = [
        index for index in range(len(files)) if loras_by_expert[index] or not has_several_experts
    ]
    if not merged_indices:
        raise OptionError("--save_merged_model has nothing to merge: pass --lora_weight or the like")
    targets = [path]
    if has_several_experts:
        targets = [path.with_name(f"{path.stem}_{expert.name}{path.suffix}") for expert in family.experts]
    for index in merged_indices:
        # Raise an error if the LoRAs of an expert cannot be merged into its file, without writing anything
        dit_file = files[index]
        loras = loras_by_expert[index]
        target = targets[index]
        reject_replacing(
            "--save_merged_model", target, [*family.dit_files, *(lora_use.lora.path for lora_use in loras)]
        )
        second_file = family.file_beside(dit_file)
        if second_file is not None:
            raise OptionError(
                f"--save_merged_model {path}: the model is in two files, {dit_file} and {second_file}. "
                "Use merge_lora.py --dit FILE for each of them; it warns of what the other one has"
            )
        check_loras_fit(dit_file, loras)
    for index, expert in enumerate(family.experts):
        if index in merged_indices:
            merge_into_file(files[index], loras_by_expert[index], targets[index], device, rounding=rounding)
        else:
            logger.warning(f"There is no LoRA for the {expert.description}: {files[index]} is used unchanged")
