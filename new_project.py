"""Describe a folder of clips or pictures for training: write dataset.toml, prompts.txt and run.toml into it.

All options: python new_project.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import read_options
from modules.parser import Parser
from project.options import NewOptions, add_new_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_new_arguments(parser)
    options = read_options(NewOptions, parser.parse_args(argv))

    from project.files import write_project  # libraries that read clips load here

    write_project(options)


if __name__ == "__main__":
    command_line(main)
