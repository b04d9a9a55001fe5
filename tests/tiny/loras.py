"""Networks of ours by their module's name, built as a training does."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from networks.apply import LoraPatch
from networks.builtin_networks import build_from_tensors, build_network
from networks.lora_network import OwnNetwork
from networks.options import NetworkOptions


def network_options(
    name: str,
    rank: int | None = None,
    alpha: float = 1.0,
    dropout: float | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> NetworkOptions:
    """Options of a network of ours by the last part of its module's name; `arguments` of --network_args."""
    return NetworkOptions.from_defaults(
        network_module=f"networks.{name}",
        network_dim=rank,
        network_alpha=alpha,
        network_dropout=dropout,
        network_args=tuple(f"{key}={value}" for key, value in arguments.items() if value is not None),
    )


def make_lora(
    name: str,
    rank: int | None,
    alpha: float | None,
    dit: nn.Module | None,
    neuron_dropout: float | None = None,
    texts: Mapping[str, nn.Module] | None = None,
    **arguments: Any,
) -> OwnNetwork:
    """A network by the last part of its module's name, `lora_wan`, not attached yet."""
    options = network_options(
        name, rank=rank, alpha=1.0 if alpha is None else alpha, dropout=neuron_dropout, arguments=arguments
    )
    return build_network(f"networks.{name}", options, dit, texts or {})


def lora_like(name: str, tensors: Mapping[str, Tensor], dit: nn.Module, **arguments: Any) -> OwnNetwork:
    """A network with the modules, ranks and alphas of a file's tensors, not their values."""
    options = network_options(name, arguments=arguments)
    return build_from_tensors(f"networks.{name}", tensors, options, dit, encoders={})


def unused(patch: LoraPatch) -> list[str]:
    """The parts of a patch's LoRAs without a weight so far, as `file: module.weight`."""
    return [
        f"{use.lora.path.name}: {key}"
        for use in patch._weighted_loras
        for key in patch._list_selected_keys(use)
        if key not in patch._keys_in_model
    ]


def write_lora_of_blocks(path: Path, dit: Path, modules: str, rank: int = 3, seed: int = 0) -> Path:
    """Write a LoRA for the Linear layers of a transformer's file whose names match a pattern."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(dit).items():
        if weight.ndim != 2 or not re.fullmatch(modules, name.removesuffix(".weight")):
            continue
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        rows, columns = weight.shape
        tensors[f"{module}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.2
        tensors[f"{module}.alpha"] = torch.tensor(float(rank))
    assert tensors, f"{dit} has no layers like {modules}"
    save_file(tensors, path)
    return path
