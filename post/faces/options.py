"""Options of restoring faces. Standard library only."""

import argparse
from dataclasses import dataclass

from post.network_options import NetworkOptions, add_network_arguments


@dataclass(frozen=True)
class FacefixOptions:
    """Which faces are restored, and how."""

    network: NetworkOptions
    mode: str
    weight: float
    upscale: float
    only_center: bool
    detection_model: str


def add_facefix_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `FacefixOptions`."""
    add_network_arguments(parser, "a GFPGAN or CodeFormer file, or the folder with it and its helpers")
    group = parser.add_argument_group("faces")
    group.add_argument("--mode", type=str, default="gfpgan", help="gfpgan or codeformer")
    group.add_argument("--weight", type=float, default=0.5, help="fidelity of CodeFormer, 0 to 1")
    group.add_argument(
        "-s", "--upscale", type=float, default=1, help="size of the result: width and height times this"
    )
    group.add_argument("--only_center", action="store_true", help="restore only the face nearest the centre")
    group.add_argument(
        "--detection_model", type=str, default="retinaface_resnet50", help="the network that finds faces"
    )
