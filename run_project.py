"""Train on a folder that `new` has described: check, cache and train with its run.toml.

All options: python run_project.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import read_options
from modules.parser import Parser
from project.options import RunOptions, add_run_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    options = read_options(RunOptions, parser.parse_args(argv))

    from project.running import run_project  # torch loads here

    run_project(options)


if __name__ == "__main__":
    command_line(main)
