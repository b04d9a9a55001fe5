"""Make masks for the images and clips of a folder: which parts of them a training learns.

A network finds what you name, such as "the person"; white parts of its masks are learned. Masks that exist
are kept, so a run that was stopped continues if it is started again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.masks.run import MaskOptions
from protocols.families import plain_script

main = plain_script(__doc__, "data_tools.masks.run.make_masks", MaskOptions)


if __name__ == "__main__":
    main.run()
