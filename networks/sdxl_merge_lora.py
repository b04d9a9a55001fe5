"""Merge LoRAs of Stable Diffusion 1.x, 2.x or XL into a checkpoint, or into one LoRA.

All options: python networks/sdxl_merge_lora.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import read_options
from modules.parser import Parser, refuse_unsupported
from networks.image_tools_options import WholeMergeOptions, add_whole_merge_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_whole_merge_arguments(parser)
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    options = read_options(WholeMergeOptions, args)

    from networks.merging_whole import merge_whole

    merge_whole(options)


if __name__ == "__main__":
    command_line(main)
