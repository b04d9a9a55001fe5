"""Train on a folder that `new` has described: check, cache and train with its run.toml.

All options: python run_project.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.parser import parse_options
from project.options import RunOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, RunOptions)

    from project.running import run_project  # torch loads here

    run_project(options)


if __name__ == "__main__":
    command_line(main)
