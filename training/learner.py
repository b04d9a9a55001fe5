"""What a run trains: a LoRA, another network that the family creates, or the model itself.

`find_network_spec` decides this once for a run and returns a record for all other code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dataset.table import DatasetConfig
from modules.errors import DatasetError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, make_network
from networks.options import NetworkOptions
from protocols.family import Described, Trains
from protocols.family_networks import CustomNetwork, DefaultRate, WritesNetwork, get_custom_network

ReadCaptions = Callable[[Sequence[str]], str]
LORA_RATE = DefaultRate(2e-5, "1e-4", 5e-3)
FULL_RATE = DefaultRate(5e-8, "1e-5", 4e-5)


class MakeNetwork(Protocol):
    """Function that adds the trained network to a loaded model.

    The arguments are the network's options, the transformer, a seed for the initial values, the trained text
    encoders by LoRA prefix, whether the transformer gets a network too, tensors of the state that will be
    loaded, and whether the network starts with the values of its file.
    """

    def __call__(
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
        """Create the network (such as a LoRA), attach its modules to the model, and return it."""
        ...


@dataclass(frozen=True)
class NetworkSpec:
    """What a run trains, such as a LoRA: functions and texts to create, check, save and describe it."""

    label: str  # "LoRA", "ControlNet-LLLite"
    rate_label: str  # "a LoRA": what `default_rate` is usual for
    default_rate: DefaultRate
    make_network: MakeNetwork | None  # None: the model itself is trained
    is_embedding: bool = False  # whether the network belongs to text encoders that learn a new word
    # None: the network has no ranks, arguments and formats of a LoRA
    lora_options: NetworkOptions | None = None
    description: str = ""  # description with sizes, for boxes; "" if the options describe it
    architecture_suffix: str = "lora"  # suffix of the architecture in the metadata
    metadata: Mapping[str, Any] = field(default_factory=dict)  # metadata entries of its files
    write_file: WritesNetwork | None = None  # None: files are written like those of LoRAs, or of the model
    check_initial_file: Callable[[], None] = lambda: None  # raises UserError if it cannot be used
    # given the dataset, and the attribute of tables whose target is the base model's prediction, return the
    # dataset to train on. Raises DatasetError
    check_data: Callable[[DatasetConfig, str], DatasetConfig] = lambda config, preserve_attribute: config
    caption_checks: Sequence[ReadCaptions] = ()  # each returns a note on captions that teach nothing
    caption_choices: Sequence[str] = ()  # replace the captions; one is drawn for each sample
    start_option: str = "network_weights"  # option for the file to start from; "": the option of the model
    # see `CustomNetwork.generate`; None: the model's own script generates with it
    generation_command: Callable[[Path, Mapping[str, Any], Sequence[str]], Sequence[str]] | None = None
    # see `CustomNetwork.write_prompt`, given `caption_choices`
    write_prompt: Callable[[Path, Mapping[str, Any], Sequence[str]], str] | None = None


FULL_MODEL = NetworkSpec(
    label="model", rate_label="a whole model", default_rate=FULL_RATE, make_network=None, start_option=""
)


def find_network_spec(
    family: Trains,
    network: NetworkOptions | None,
    lora_replacement: Callable[[Described], CustomNetwork] | None = None,
) -> NetworkSpec:
    """Return a description of what a run trains (a LoRA, another network, or the model) and how to create it.

    Args:
        family: The model family.
        network: Options of the network; None if the model itself is trained.
        lora_replacement: Returns the network that a feature trains instead of a LoRA; None without one.
    """
    if network is None:
        return FULL_MODEL
    if lora_replacement is not None:
        return replace(_describe_custom_network(lora_replacement(family)), is_embedding=True)
    custom = get_custom_network(family) if family.abilities.has_custom_network else None
    if custom is not None:
        return _describe_custom_network(custom)
    return NetworkSpec(
        label="LoRA",
        rate_label="a LoRA",
        default_rate=LORA_RATE,
        make_network=partial(_make_lora, family.lora_module),
        lora_options=network,
    )


def _describe_custom_network(custom: CustomNetwork) -> NetworkSpec:
    """Return the `NetworkSpec` of a network that the model family defines, such as a ControlNet."""
    # captions should contain the trained word, unless the run trains on its own sentences
    reads_captions = custom.in_text_encoders and not custom.sentences
    return NetworkSpec(
        label=custom.label,
        rate_label=custom.label,
        default_rate=custom.default_rate,
        make_network=partial(_make_custom_network, custom),
        description=custom.description,
        architecture_suffix=custom.architecture_suffix,
        metadata=custom.values,
        write_file=custom.write,
        check_initial_file=custom.check,
        check_data=partial(_check_data, custom),
        caption_checks=(custom.check_captions,) if reads_captions else (),
        caption_choices=custom.sentences,
        start_option=custom.start_option,
        generation_command=custom.generate,
        write_prompt=custom.write_prompt,
    )


def _make_lora(
    module: str,
    options: NetworkOptions,
    dit: nn.Module,
    seed: int,
    *,
    encoders: Mapping[str, nn.Module],
    trains_dit: bool,
    resumed_tensors: Mapping[str, Tensor] | None = None,
    has_initial_values: bool = True,
) -> TrainableNetwork:
    """Create a LoRA (or a similar network, such as a LoKr) and attach it to the model."""
    # `module` is the network module of the family's LoRAs. `has_initial_values` is unused (see
    # `MakeNetwork`).
    return make_network(
        options, module, dit, seed, encoders=encoders, trains_dit=trains_dit, resumed=resumed_tensors
    )


def _make_custom_network(
    custom: CustomNetwork,
    options: NetworkOptions,
    dit: nn.Module,
    seed: int,
    *,
    encoders: Mapping[str, nn.Module],
    trains_dit: bool,
    resumed_tensors: Mapping[str, Tensor] | None = None,
    has_initial_values: bool = True,
) -> TrainableNetwork:
    """Create a network that the model family defines, such as a ControlNet."""
    # See `MakeNetwork` for arguments.
    # `options` and `resumed_tensors` are not used, because `custom` contains the network's settings.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "network"))
        module = custom.make(nn.ModuleDict(encoders) if custom.in_text_encoders else dit, has_initial_values)
    return ForeignNetwork(module.requires_grad_(True), dit)


def _check_data(custom: CustomNetwork, config: DatasetConfig, preserve_attribute: str) -> DatasetConfig:
    """Check the tables for a family's own network: control images, or images of a new word."""
    # Returns the dataset, in which images need no captions if sentences replace them.
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
