"""Convert a LoRA file between dialects. All options: python convert_lora.py --help"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from modules.parser import parse_options
from networks.tool_options import ConvertOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, ConvertOptions)

    from networks.convert import convert

    convert(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
