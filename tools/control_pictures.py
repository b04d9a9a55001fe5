"""Make a control image for each image of a folder: its edges, or a depth map.

A training with control images (docs/control.md) learns from such pairs. Control images that exist are
kept, so a run that was stopped continues if it is started again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.controls.run import ControlImageOptions, make_control_images
from protocols.families import plain_script

main = plain_script(__doc__, make_control_images, ControlImageOptions)


if __name__ == "__main__":
    main.run()
