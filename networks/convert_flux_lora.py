"""Convert a LoRA of FLUX.1 or Chroma between sd-scripts' and ai-toolkit's (diffusers') names."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.convert import FluxConvertOptions, convert_flux
from protocols.families import plain_script

main = plain_script(__doc__, convert_flux, FluxConvertOptions)


if __name__ == "__main__":
    main.run()
