"""Convert a LoRA of Anima to ComfyUI's names, or back."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.convert import ComfyConvertOptions, convert_anima
from protocols.families import plain_script

main = plain_script(__doc__, convert_anima, ComfyConvertOptions)


if __name__ == "__main__":
    main.run()
