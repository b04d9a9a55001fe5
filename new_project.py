"""Describe a folder of clips or pictures for training: write dataset.toml, prompts.txt and run.toml into it.

All options: python new_project.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.parser import parse_options
from project.options import NewOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, NewOptions)

    from project.files import write_project  # libraries that read clips load here

    write_project(options)


if __name__ == "__main__":
    command_line(main)
