"""Convert a LoRA file between dialects. All options: python convert_lora.py --help"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from modules.options import read_options
from modules.parser import Parser
from networks.options import ConvertOptions, add_convert_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_convert_arguments(parser)
    options = read_options(ConvertOptions, parser.parse_args(argv))

    from networks.convert import convert

    convert(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
