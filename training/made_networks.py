"""Make the network that a training puts into a model: a LoRA, or what the family makes in its place."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from contract.family import Family
from contract.made_networks import MadeNetwork, WritesNetwork, made_network_of
from dataset.table import DatasetConfig
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, make_network
from networks.options import NetworkOptions


def make_trained_network(
    family: Family,
    options: NetworkOptions,
    dit: nn.Module,
    seed: int,
    *,
    encoders: Mapping[str, nn.Module],
    in_dit: bool,
    resumed: Mapping[str, Tensor] | None = None,
    with_values: bool = True,
) -> TrainableNetwork:
    """Return the network that learns, put into the loaded model.

    with_values: it begins with those of its file. The rest as in `networks.adapter.make_network`.
    """
    made = made_network_of(family)
    if made is None:
        return make_network(
            options,
            family.lora_module,
            dit,
            seed,
            encoders=encoders,
            in_dit=in_dit,
            resumed=resumed,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "network"))
        module = made.make(dit, with_values)
    return ForeignNetwork(module.requires_grad_(True), dit)


def written_by(family: Family) -> WritesNetwork | None:
    """Return what writes files of a made network that have a form of their own."""
    made = made_network_of(family)
    return None if made is None else made.write


def check_data(made: MadeNetwork | None, config: DatasetConfig) -> None:
    """Check the control pictures of a made network. Raises DatasetError."""
    if made is not None:
        from dataset.control_pairs import check_pairs  # other trainings read caches alone

        check_pairs(config, made.called)
