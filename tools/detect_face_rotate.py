"""Cut faces out of the images of a folder, turn them upright, and write them to another folder."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.face_crops import CropFacesOptions, crop_faces
from protocols.families import plain_script

main = plain_script(__doc__, crop_faces, CropFacesOptions)


if __name__ == "__main__":
    main.run()
