"""Enlarge videos and pictures with SwinIR or a network of the ESRGAN family.

All options: python blissful_tuner/upscaler.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from post.chain_options import read_chain


def main(argv: Sequence[str] | None = None) -> None:
    """Work on the files that the command line names. Raises UserError."""
    chain = read_chain("upscaler", __doc__ or "", argv)

    from post.run import run_chain

    run_chain(chain)


if __name__ == "__main__":
    command_line(main, explain=identify)
