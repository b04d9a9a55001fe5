"""Extract a LoRA from a fine-tuned FLUX.1 or Chroma model.

All options: python networks/flux_extract_lora.py --help
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
from networks.tool_options import OF_WHOLE, ExtractOptions, FluxExtractWords


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = parse_options(__doc__, argv, ExtractOptions, FluxExtractWords, without=OF_WHOLE)

    from networks.extracting import extract_flux

    extract_flux(options)


if __name__ == "__main__":
    command_line(main)
