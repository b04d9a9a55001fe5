"""Extract a LoRA from a fine-tuned FLUX.1, FLUX.2 or Chroma model."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.extracting import NON_DIT_OPTIONS, BlockExtractOptions, ExtractOptions
from protocols.families import plain_script

main = plain_script(
    __doc__, "networks.extracting.extract_flux", ExtractOptions, BlockExtractOptions, without=NON_DIT_OPTIONS
)


if __name__ == "__main__":
    main.run()
