"""Write a page about a dataset: what a training will see of it, and what is wrong with it.

All options: python tools/dataset_report.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.report.options import ReportOptions
from dataset.config import load_dataset_config
from modules.command import command_line
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, ReportOptions)
    config = load_dataset_config(options.dataset_config)

    from data_tools.report.run import run_report  # the libraries that read media load here

    run_report(config, options)


if __name__ == "__main__":
    command_line(main)
