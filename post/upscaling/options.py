"""Options of the upscaler. Standard library only."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least
from post.network_options import ToolNetworkOptions, add_network_arguments

AUTO = "auto"


@dataclass(frozen=True)
class UpscalerOptions:
    """How pictures are enlarged."""

    network: ToolNetworkOptions
    mode: str  # swinir, esrgan: only the output's name; the network is told from the file
    scale: float
    tile: int | None  # pixels; 0: never; None: if memory ends
    tile_overlap: int
    batch_size: int | None  # pictures; None: by their size

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise OptionError(f"--scale {self.scale}: give a number above 0, such as 2")
        check_at_least("--tile", self.tile, 0, "0 means never; auto: if memory ends")
        check_at_least("--tile_overlap", self.tile_overlap, 0, "0 lays tiles side by side")
        check_at_least("--batch_size", self.batch_size, 1, "auto chooses by the size of the pictures")
        if self.tile and 2 * self.tile_overlap > self.tile:
            raise OptionError(
                f"--tile_overlap {self.tile_overlap} is more than half of --tile {self.tile}. Use larger "
                "tiles or a smaller overlap"
            )


def add_upscaler_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `UpscalerOptions`."""
    add_network_arguments(parser, "a SwinIR, ESRGAN, BSRGAN or Real-ESRGAN file (.pth, .safetensors)")
    group = parser.add_argument_group("upscaling")
    group.add_argument(
        "--mode", type=str, default="swinir", choices=["swinir", "esrgan"], help="the kind of network"
    )
    group.add_argument(
        "--scale", type=float, default=2, help="size of the result: width and height times this"
    )
    group.add_argument(
        "--tile",
        type=auto_or_number,
        default=AUTO,
        help="size of the pieces that pictures are cut into, in pixels of the input; 0: never; auto: only if "
        "memory does not hold the whole picture",
    )
    group.add_argument(
        "--tile_overlap", type=int, default=32, help="pixels that pieces share; they are blended there"
    )
    group.add_argument(
        "--batch_size",
        type=auto_or_number,
        default=AUTO,
        help="pictures that are computed at once; auto: one on a CPU, several small ones on a GPU",
    )


def auto_or_number(text: str) -> int | None:
    """Parse a whole number, or `auto`: None."""
    if text.lower() == AUTO:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTO}") from None
