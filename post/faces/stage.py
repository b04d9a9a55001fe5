"""The stage of this room."""

import torch

from modules.errors import OptionError
from post.contract import Stage
from post.faces.options import FacefixOptions


def check_facefix(options: FacefixOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    raise OptionError("not there yet")


def make_facefix(options: FacefixOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_facefix`."""
    raise OptionError("not there yet")
