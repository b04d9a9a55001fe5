"""Load tiny checkpoints in tests."""

import argparse
from pathlib import Path

import torch

from modules.options import read_options
from stable_diffusion.contract import Model
from stable_diffusion.loading import load_model
from stable_diffusion.model_options import ModelOptions, add_model_arguments

CPU = torch.device("cpu")


def model_options(ckpt: Path | str, *others: object) -> ModelOptions:
    """What a command line with these options says of the model."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return read_options(ModelOptions, parser.parse_args(["--ckpt", str(ckpt), *map(str, others)]))


def load(ckpt: Path | str, *others: object, device: torch.device = CPU) -> Model:
    """Load a checkpoint as gen_img.py would."""
    return load_model(model_options(ckpt, *others), device)
