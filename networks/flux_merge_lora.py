"""Merge LoRAs of FLUX.1 or Chroma into a model and its text encoders, or into one LoRA.

All options: python networks/flux_merge_lora.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.parser import parse_options
from networks.tool_options import FluxMergeOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, FluxMergeOptions)

    from networks.merging import merge_flux

    merge_flux(options)


if __name__ == "__main__":
    command_line(main)
