"""Options of the upscaler. Standard library only."""

import argparse

from modules.errors import OptionError
from modules.options import Options, option
from post.run_options import ToolNetworkOptions

AUTO = "auto"


def auto_or_number(text: str) -> int | None:
    """Parse a whole number, or `auto`: None."""
    if text.lower() == AUTO:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTO}") from None


class UpscalerOptions(Options, title="upscaling"):
    """How pictures are enlarged."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "a SwinIR, ESRGAN, BSRGAN or Real-ESRGAN file (.pth, .safetensors)"}}
    )
    mode: str = option(  # only the output's name; the network is told from the file
        "the kind of network", default="swinir", choices=("swinir", "esrgan")
    )
    scale: float = option("size of the result: width and height times this", default=2, above=0)
    tile: int | None = option(
        "size of the pieces that pictures are cut into, in pixels of the input; 0: never; auto, the default: "
        "only if memory does not hold the whole picture",
        type=auto_or_number,
        least=0,
    )
    tile_overlap: int = option("pixels that pieces share; they are blended there", default=32, least=0)
    batch_size: int | None = option(
        "pictures that are computed at once; auto, the default: one on a CPU, several small ones on a GPU",
        type=auto_or_number,
        least=1,
    )

    def __post_init__(self) -> None:
        if self.tile and 2 * self.tile_overlap > self.tile:
            raise OptionError(
                f"--tile_overlap {self.tile_overlap} is more than half of --tile {self.tile}. Use larger "
                "tiles or a smaller overlap"
            )
