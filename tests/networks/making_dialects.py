"""LoRA files as other tools write them: diffusers, and tools that write module paths with points."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from networks.lora_network import OwnNetwork
from networks.module_names import module_path
from networks.names.layouts import FamilyNames


def saved_by_diffusers(
    theirs: Any, path: Path, targets: Any, alpha: int = 4, with_settings: bool = True
) -> Path:
    """Give a model of diffusers a random LoRA of rank 4 and save it, the adapter's settings in the metadata
    or nowhere.
    """
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    if with_settings:
        theirs.save_lora_adapter(path.parent, weight_name=path.name)
    else:
        names = {
            name.replace(".default", ""): tensor
            for name, tensor in theirs.state_dict().items()
            if "lora_" in name
        }
        save_file({f"transformer.{name}": tensor for name, tensor in names.items()}, path)
    return path


def saved_with_points(
    network: OwnNetwork,
    path: Path,
    family: FamilyNames,
    start: str,
    state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Path:
    """A network's factors as diffusion-pipe and PEFT name them.

    start: before the paths. state: renames them, as ComfyUI does.
    """
    theirs = {}
    for name, layer in network.named_children():
        (renamed,) = state(
            {f"{module_path(name.removeprefix('lora_unet_'), family)}.weight": layer.lora_up.weight}
        )
        theirs[f"{start}{renamed.removesuffix('weight')}lora_A.weight"] = layer.lora_down.weight.detach()
        theirs[f"{start}{renamed.removesuffix('weight')}lora_B.weight"] = layer.lora_up.weight.detach()
    save_file(theirs, path)
    return path
