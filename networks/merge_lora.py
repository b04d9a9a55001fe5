"""Merge LoRAs of Stable Diffusion into a checkpoint, or into one LoRA, like networks/sdxl_merge_lora.py."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.merging import FullMergeOptions
from protocols.families import plain_script

main = plain_script(__doc__, "networks.merging.merge_full", FullMergeOptions)


if __name__ == "__main__":
    main.run()
