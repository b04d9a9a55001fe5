"""Merge LoRAs into one LoRA of a smaller rank, the nearest one to their sum."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.svd_merging import SvdMergeOptions, merge_and_resize
from protocols.families import plain_script

main = plain_script(__doc__, merge_and_resize, SvdMergeOptions)


if __name__ == "__main__":
    main.run()
