"""Download the models that a task needs."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from downloads.listing import print_list
from downloads.naming import DownloadOptions
from modules.command import command_line
from modules.script_options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """Download the files of a task, or with --list print the tasks and files."""
    (options,) = parse_options(__doc__, argv, DownloadOptions)

    if options.list_only:
        print_list(options.sets(), options.to)
        return

    from downloads.fetching import run_download  # the libraries for the network load here

    run_download(options)


if __name__ == "__main__":
    command_line(main)
