"""Average the saved LoRA files of a run (post-hoc EMA). All options: python lora_post_hoc_ema.py --help"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from modules.options import read_options
from modules.parser import Parser
from networks.averaging_options import AveragingOptions, add_averaging_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_averaging_arguments(parser)
    options = read_options(AveragingOptions, parser.parse_args(argv))

    from networks.averaging import average_files

    average_files(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
