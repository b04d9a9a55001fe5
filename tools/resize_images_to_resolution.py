"""Write smaller copies of the images of a folder, of at most the given sizes."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.smaller_images import ResizeImagesOptions, resize_images
from protocols.families import plain_script

main = plain_script(__doc__, resize_images, ResizeImagesOptions)


if __name__ == "__main__":
    main.run()
