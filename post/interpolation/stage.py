"""The stage of this room."""

import torch

from modules.errors import OptionError
from post.contract import Stage
from post.interpolation.options import InterpolationOptions


def check_interpolation(options: InterpolationOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    raise OptionError("not there yet")


def make_interpolation(options: InterpolationOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_interpolation`."""
    raise OptionError("not there yet")
