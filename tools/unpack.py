"""Make the folder of a file that `pack` wrote, and print the command that trains it."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from project.unpacking import UnpackOptions
from protocols.families import plain_script

main = plain_script(__doc__, "project.unpacking.unpack_folder", UnpackOptions)


if __name__ == "__main__":
    main.run()
