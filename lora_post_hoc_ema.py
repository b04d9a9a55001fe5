"""Average the saved LoRA files of a run (post-hoc EMA). All options: python lora_post_hoc_ema.py --help"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from modules.parser import parse_options
from networks.tool_options import AveragingOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, AveragingOptions)

    from networks.averaging import average_files

    average_files(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
