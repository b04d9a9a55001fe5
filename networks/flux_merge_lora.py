"""Merge LoRAs of FLUX.1 or Chroma into a model and its text encoders, or into one LoRA."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.merging import FluxMergeOptions
from protocols.families import plain_script

main = plain_script(__doc__, "networks.merging.merge_flux", FluxMergeOptions)


if __name__ == "__main__":
    main.run()
