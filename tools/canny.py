"""Draw the edges of one image. tools/control_pictures.py draws them for a folder."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.controls.edges_of_image import DrawEdgesOptions, draw_image_edges
from protocols.families import plain_script

main = plain_script(__doc__, draw_image_edges, DrawEdgesOptions)


if __name__ == "__main__":
    main.run()
