"""Enlarge videos and images with SwinIR or a network of the ESRGAN family."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from postprocessing.scripts import tool_script

main = tool_script("upscaler", __doc__)


if __name__ == "__main__":
    main.run()
