"""Cache a dataset on a Ray cluster: any caching command, its work shared by actors on all machines."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from dataset.options import read_ray_options
from modules.command import command_line
from modules.installation import import_own
from protocols.families import identify


def main(argv: Sequence[str] | None = None) -> None:
    """Run a caching command on a Ray cluster; `argv` is the command and its options."""
    options = read_ray_options(__doc__, argv)
    script = import_own(options.script)

    from dataset.caching.on_ray import run_on_ray  # torch loads here, after options are read

    run_on_ray(script.main, options)


if __name__ == "__main__":
    command_line(main, explain=identify)
