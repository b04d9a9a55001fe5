"""The stage of this room."""

import torch

from modules.errors import OptionError
from post.blurring.options import BlurOptions
from post.contract import Stage


def check_blur(options: BlurOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    raise OptionError("not there yet")


def make_blur(options: BlurOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_blur`."""
    raise OptionError("not there yet")
