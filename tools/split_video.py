"""Cut footage into clips for a dataset, at its scenes. All options: python tools/split_video.py --help"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.cutting.options import CuttingOptions
from modules.command import command_line
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, CuttingOptions)

    from data_tools.cutting.run import cut_footage  # what reads videos loads here

    cut_footage(options)


if __name__ == "__main__":
    command_line(main)
