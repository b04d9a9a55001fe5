"""What training requires of a family that trains a network next to the frozen model instead of a LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from protocols.family import Described


class WritesNetwork(Protocol):
    """Function that writes a trained network to a file."""

    def __call__(
        self, module: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
    ) -> None:
        """Write `module` and `metadata` to `path`; `dtype` None keeps the trained weights' dtypes."""


@dataclass(frozen=True)
class DefaultRate:
    """The usual learning rates for Adam: the lowest, the highest, and a typical one."""

    low: float
    default: str
    high: float


@dataclass(frozen=True)
class CustomNetwork:
    """A network that a family creates for a training run.

    It runs alongside the model and gets a control image for each image, or it is part of the text encoders
    (`in_text_encoders`).
    """

    label: str  # "ControlNet-LLLite"
    description: str  # with its sizes, for boxes
    architecture_suffix: str  # suffix of the architecture in metadata; a LoRA has "lora"
    # puts the module into the loaded model, or into an nn.ModuleDict of the text encoders in their order;
    # returns it, with what `networks.adapter.ForeignNetwork` requires; its state
    # dict is what states contain. The second argument: whether it starts with its file's values
    make: Callable[[nn.Module, bool], nn.Module]
    check: Callable[[], None]  # raises UserError for a file that it cannot start from; loads nothing
    # script and options that generate with a saved file, given the file, the values of a sample, and script
    # and options that make this sample with the model alone
    generate: Callable[[Path, Mapping[str, Any], Sequence[str]], Sequence[str]]
    default_rate: DefaultRate
    write: WritesNetwork | None = None  # None: files contain the state dict
    # logs information about it before its values are saved
    report: Callable[[nn.Module], None] = lambda module: None
    start_option: str = "network_weights"  # option of the file that it starts from
    values: Mapping[str, Any] = field(default_factory=dict)  # entries of its files
    in_text_encoders: bool = False  # it is a part of the text encoders, and sees only captions
    # given the captions of all images: names those from which it learns nothing, "" if there are none;
    # raises DatasetError if these are all captions
    check_captions: Callable[[Sequence[str]], str] = lambda captions: ""
    sentences: Sequence[str] = ()  # instead of captions: one is drawn for each image of a batch
    # returns the prompt that generates with a saved file, given the file, the values of a sample, and
    # `sentences`; None: the prompt of the sample
    write_prompt: Callable[[Path, Mapping[str, Any], Sequence[str]], str] | None = None

    @property
    def reads_captions(self) -> bool:
        """Whether captions should contain the trained word, because no sentences replace them."""
        return self.in_text_encoders and not self.sentences


def describe_start(called: str, sizes: str, path: Path | None) -> str:
    """Describe a new network by its sizes, or by the file from which its weights come."""
    return f"{called}{sizes}" if path is None else f"{called} of {path.name}"


class HasCustomNetwork(Described, Protocol):
    """A family that trains an additional network in some runs."""

    @property
    def custom_network(self) -> CustomNetwork | None:
        """The additional network that this run trains next to the frozen model; None if it trains a LoRA."""


def get_custom_network(family: Described) -> CustomNetwork | None:
    """Return the network that a family trains instead of a LoRA; None if it trains LoRAs."""
    return cast(HasCustomNetwork, family).custom_network if family.abilities.has_custom_network else None
