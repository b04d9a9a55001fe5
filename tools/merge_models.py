"""Merge whole checkpoints of one model: the weighted sum of their weights."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from checkpoints.weighted_sum import MergeModelsOptions, merge_models
from protocols.families import plain_script

main = plain_script(__doc__, merge_models, MergeModelsOptions)


if __name__ == "__main__":
    main.run()
