"""The stage of this room."""

import torch

from modules.errors import OptionError
from post.contract import Stage
from post.upscaling.options import UpscalerOptions


def check_upscaler(options: UpscalerOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    raise OptionError("not there yet")


def make_upscaler(options: UpscalerOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_upscaler`."""
    raise OptionError("not there yet")
