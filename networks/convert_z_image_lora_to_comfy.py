"""Convert a LoRA of Z-Image to ComfyUI's names, or back."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.convert import JoiningConvertOptions, convert_z_image
from protocols.families import plain_script

main = plain_script(__doc__, convert_z_image, JoiningConvertOptions)


if __name__ == "__main__":
    main.run()
