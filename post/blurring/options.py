"""Options of blurring. Standard library only."""

import argparse
from dataclasses import dataclass

from post.network_options import NetworkOptions, add_network_arguments


@dataclass(frozen=True)
class BlurOptions:
    """What is blurred, and how."""

    network: NetworkOptions
    strength: int
    sigmax: int
    conf: float


def add_blur_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `BlurOptions`."""
    add_network_arguments(parser, "a detector: YuNet or YOLO as .onnx, RetinaFace as .pth or .safetensors")
    group = parser.add_argument_group("blur")
    group.add_argument("--strength", type=int, default=51, help="size of the blur in pixels, made odd")
    group.add_argument("--sigmax", type=int, default=40, help="its standard deviation in pixels")
    group.add_argument("--conf", type=float, default=0.5, help="least score of what is blurred, 0 to 1")
