"""Make the network that a training puts into a model: a LoRA, or what the family makes in its place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from contract.family import Family, Trains
from contract.made_networks import MadeNetwork, WritesNetwork, made_network_of
from dataset.table import DatasetConfig
from modules.errors import DatasetError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, make_network
from networks.options import NetworkOptions

ReadCaptions = Callable[[Sequence[str]], str]


def make_trained_network(
    family: Trains,
    options: NetworkOptions,
    dit: nn.Module,
    seed: int,
    *,
    encoders: Mapping[str, nn.Module],
    in_dit: bool,
    resumed: Mapping[str, Tensor] | None = None,
    with_values: bool = True,
) -> TrainableNetwork:
    """Return the trained network, put into the loaded model.

    Args:
        family: The model family.
        options: Options of the run.
        dit: The transformer.
        seed: See `networks.adapter.make_network`, as for the following ones.
        encoders: Text encoders that are trained too.
        in_dit: Whether the transformer gets a network.
        resumed: Tensors of the state that the run resumes from.
        with_values: Whether the network starts with the values of its file.
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
        module = made.make(nn.ModuleDict(encoders) if made.in_texts else dit, with_values)
    return ForeignNetwork(module.requires_grad_(True), dit)


def check_made_networks(family: Family) -> MadeNetwork | None:
    """Check what a made network begins with. Nothing is loaded.

    Returns the network that is trained in place of a LoRA, if there is one. Raises UserError.
    """
    made = made_network_of(family)
    if made is not None:
        made.check()
    return made


def written_by(family: Family) -> WritesNetwork | None:
    """Return what writes files of a made network that have a form of their own."""
    made = made_network_of(family)
    return None if made is None else made.write


def check_data(made: MadeNetwork | None, config: DatasetConfig, kept: str) -> DatasetConfig:
    """Check the tables of a made network: its control images, or that all images show what it learns.

    Args:
        made: The network; None for a LoRA.
        config: The dataset, as read from its file.
        kept: Attribute of tables whose samples must remain as the model without a network predicts them.

    Returns:
        The tables; if sentences take the place of captions, images need none.

    Raises:
        DatasetError: If a table does not fit the network.
    """
    if made is None:
        return config
    if not made.in_texts:
        from dataset.control_pairs import check_pairs  # other trainings read caches alone

        check_pairs(config, made.called)
        return config
    for table in config.datasets:
        if table.is_reg:
            raise DatasetError(
                f"{table.name}: {made.called} learns nothing from regularisation pictures, as their captions "
                "lack the word. Leave them out"
            )
        if kept in table.attributes:
            raise DatasetError(
                f"{table.name}: {kept} compares a network in the transformer with the model without it, and "
                f"{made.called} has none there. Leave it out"
            )
    if not made.sentences:
        return config
    tables = tuple(replace(table, class_tokens=table.class_tokens or "") for table in config.datasets)
    return replace(config, datasets=tables)


def list_caption_readers(family: Family) -> list[ReadCaptions]:
    """Return what says of which captions a made network learns nothing, if it learns from captions alone."""
    made = made_network_of(family)
    return [made.check_captions] if made is not None and made.in_texts and not made.sentences else []
