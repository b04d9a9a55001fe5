"""Extract a LoRA from a fine-tuned Stable Diffusion 1.x, 2.x or XL checkpoint.

All options: python networks/extract_lora_from_models.py --help
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
from networks.tool_options import ExtractOptions, WholeExtractWords


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = parse_options(__doc__, argv, ExtractOptions, WholeExtractWords)

    from networks.extracting import extract_whole

    extract_whole(options)


if __name__ == "__main__":
    command_line(main)
