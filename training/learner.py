"""What a run trains: a LoRA, another network that the family creates, or the model itself.

`find_network_spec` decides this once for a run and returns a record for all other code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dataset.table import DatasetConfig
from modules.errors import DatasetError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, make_network
from networks.options import NetworkOptions
from protocols.family import Described, Trains
from protocols.family_networks import CustomNetwork, DefaultRate, get_custom_network

ReadCaptions = Callable[[Sequence[str]], str]
LORA_RATE = DefaultRate(2e-5, "1e-4", 5e-3)
FULL_RATE = DefaultRate(5e-8, "1e-5", 4e-5)


@dataclass(frozen=True)
class NetworkSpec:
    """What a run trains: a LoRA, a network that the family defines, or, without either, the model itself."""

    # None: the network has no ranks, arguments and formats of a LoRA
    lora_options: NetworkOptions | None = None
    lora_module: str = ""  # the network module of the family's LoRAs
    custom: CustomNetwork | None = None
    is_embedding: bool = False  # whether the network belongs to text encoders that learn a new word

    def make_network(
        self,
        options: NetworkOptions,
        dit: nn.Module,
        seed: int,
        *,
        encoders: Mapping[str, nn.Module],
        trains_dit: bool,
        resumed_tensors: Mapping[str, Tensor] | None = None,
        has_initial_values: bool = True,
    ) -> TrainableNetwork:
        """Create the trained network, attach its modules to the loaded model, and return it.

        Args:
            options: Options of a LoRA; a network of the family contains its own settings.
            dit: The transformer.
            seed: Seed of the initial values.
            encoders: Trained text encoders, by LoRA prefix.
            trains_dit: Whether the transformer gets a LoRA too.
            resumed_tensors: Tensors of the state that will be loaded into a LoRA.
            has_initial_values: Whether a network of the family starts with the values of its file.
        """
        if self.custom is None:
            return make_network(
                options,
                self.lora_module,
                dit,
                seed,
                encoders=encoders,
                trains_dit=trains_dit,
                resumed=resumed_tensors,
            )
        part = nn.ModuleDict(encoders) if self.custom.in_text_encoders else dit
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "network"))
            module = self.custom.make(part, has_initial_values)
        return ForeignNetwork(module.requires_grad_(True), dit)


FULL_MODEL = NetworkSpec()


def find_network_spec(
    family: Trains,
    network: NetworkOptions | None,
    lora_replacement: Callable[[Described], CustomNetwork] | None = None,
) -> NetworkSpec:
    """Return what a run trains (a LoRA, another network, or the model), with a method that creates it.

    Args:
        family: The model family.
        network: Options of the network; None if the model itself is trained.
        lora_replacement: Returns the network that a feature trains instead of a LoRA; None without one.
    """
    if network is None:
        return FULL_MODEL
    if lora_replacement is not None:
        return NetworkSpec(custom=lora_replacement(family), is_embedding=True)
    custom = get_custom_network(family) if family.abilities.has_custom_network else None
    if custom is not None:
        return NetworkSpec(custom=custom)
    return NetworkSpec(network, family.lora_module)


def check_data(custom: CustomNetwork, config: DatasetConfig, preserve_attribute: str) -> DatasetConfig:
    """Check the tables for a family's own network: control images, or images of a new word.

    Args:
        custom: The network.
        config: The dataset.
        preserve_attribute: Attribute of tables whose target is the prediction of the base model.

    Returns:
        The dataset to train on, in which images need no captions if sentences replace them.

    Raises:
        DatasetError: If the network cannot learn from a table.
    """
    if not custom.in_text_encoders:
        from dataset.control_pairs import check_pairs  # other runs read only caches

        check_pairs(config, custom.label)
        return config
    for table in config.datasets:
        if table.learning.is_reg:
            raise DatasetError(
                f"{table.name}: {custom.label} learns nothing from regularization images, as their captions "
                "lack the word. Omit them"
            )
        if preserve_attribute in table.learning.attributes:
            raise DatasetError(
                f"{table.name}: {preserve_attribute} compares a network in the transformer with the model "
                f"without it, and {custom.label} has none there. Omit it"
            )
    if not custom.sentences:
        return config
    # class_tokens is the caption of images without a caption file: "" makes such files unnecessary
    tables = tuple(
        table.with_values(class_tokens=table.captions.class_tokens or "") for table in config.datasets
    )
    return replace(config, datasets=tables)
