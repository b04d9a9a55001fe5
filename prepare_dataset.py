"""Prepare clips and captions in CogVideoX form: the folders that load_tensors of a dataset reads.

All options: python prepare_dataset.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from data_tools.cogvideox.options import PrepareOptions
from modules.command import command_line
from modules.families import identify
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, PrepareOptions)

    from data_tools.cogvideox.preparing import prepare  # torch loads here, after every option has been read

    prepare(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
