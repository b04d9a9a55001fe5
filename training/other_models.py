"""Models that a run loads in addition to the trained one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modules.console import quiet
from modules.errors import CheckpointError
from protocols.family import Family
from protocols.loading import Placement

Shapes = Mapping[str, tuple[int, ...]]
UNUSED = Placement(torch.device("meta"))  # for networks of which only the headers are read


def _make_none(dit: Path) -> Family:
    raise ValueError(f"nothing makes the model of {dit}")


@dataclass(frozen=True)
class OtherFamilies:
    """The model that generates samples, if it is not the trained one, and a factory of teacher models."""

    sampling: Family | None = None  # model with all transformers of samples; None: they are all trained
    # returns the trained model with the transformer of another file; all other options are equal
    with_dit: Callable[[Path], Family] = _make_none


NO_OTHERS = OtherFamilies()


def require_equal_shapes(other: Family, trained: Family, option: str, consequence: str) -> None:
    """Raise CheckpointError if a transformer's weights differ in shape from the trained transformer's.

    Only headers of files are compared. Weights that one of the two lacks are ignored.

    Args:
        other: Family of the other file.
        trained: Family of the trained model.
        option: Option of the other file.
        consequence: Reason why shapes must be equal, for the message.
    """
    with quiet():
        shapes = list_shapes(trained.load_dit(UNUSED))
        for index in range(len(other.experts)):
            for name, shape in list_shapes(other.load_dit(UNUSED, index)).items():
                if shapes.get(name, shape) != shape:
                    raise CheckpointError(
                        f"{option}: its {name} has the shape {list(shape)}, but in the trained transformer "
                        f"{list(shapes[name])}, so {consequence}. Pass the file that belongs to it"
                    )


def list_shapes(network: nn.Module) -> Shapes:
    """Return the shapes of a network's parameters by name; packed weights have their unpacked shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes
