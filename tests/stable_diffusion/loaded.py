"""Load tiny checkpoints in tests."""

from contextlib import ExitStack
from pathlib import Path

import torch

from modules.parser import parse_options
from stable_diffusion.contract import Model
from stable_diffusion.loading import check_attention, load_release, open_release
from stable_diffusion.options import ModelOptions

CPU = torch.device("cpu")


def model_options(ckpt: Path | str, *others: object) -> ModelOptions:
    """What a command line with these options says of the model."""
    options: ModelOptions
    (options,) = parse_options(None, ["--ckpt", str(ckpt), *map(str, others)], ModelOptions)
    return options


def load_model(options: ModelOptions, device: torch.device = CPU) -> Model:
    """Load a checkpoint as gen_img.py would."""
    check_attention(options, device)
    with ExitStack() as files:
        return load_release(options, open_release(options, files), device)


def load(ckpt: Path | str, *others: object, device: torch.device = CPU) -> Model:
    """Load the checkpoint of a command line."""
    return load_model(model_options(ckpt, *others), device)
