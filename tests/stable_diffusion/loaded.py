"""Load tiny checkpoints in tests."""

from pathlib import Path

import torch

from modules.parser import parse_options
from stable_diffusion.contract import Model
from stable_diffusion.loading import load_model
from stable_diffusion.options import ModelOptions

CPU = torch.device("cpu")


def model_options(ckpt: Path | str, *others: object) -> ModelOptions:
    """What a command line with these options says of the model."""
    options: ModelOptions
    (options,) = parse_options(None, ["--ckpt", str(ckpt), *map(str, others)], ModelOptions)
    return options


def load(ckpt: Path | str, *others: object, device: torch.device = CPU) -> Model:
    """Load a checkpoint as gen_img.py would."""
    return load_model(model_options(ckpt, *others), device)
