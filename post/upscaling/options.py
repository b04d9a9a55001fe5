"""Options of the upscaler. Standard library only."""

import argparse
from dataclasses import dataclass

from post.network_options import NetworkOptions, add_network_arguments


@dataclass(frozen=True)
class UpscalerOptions:
    """How pictures are enlarged."""

    network: NetworkOptions
    mode: str  # swinir, esrgan: only the output's name; the network is told from the file
    scale: float


def add_upscaler_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `UpscalerOptions`."""
    add_network_arguments(parser, "a SwinIR or ESRGAN file (.pth, .safetensors)")
    group = parser.add_argument_group("upscaling")
    group.add_argument(
        "--mode", type=str, default="swinir", choices=["swinir", "esrgan"], help="the kind of network"
    )
    group.add_argument(
        "--scale", type=float, default=2, help="size of the result: width and height times this"
    )
