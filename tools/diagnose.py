"""Say why a LoRA does not learn what it should: findings about a dataset, a run or LoRA files.

Each finding has its figure, what it means for the training, and what changes it. No model is loaded, only its
tokenizers.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from diagnosis.run import DiagnoseOptions, run_diagnosis
from protocols.families import plain_script

main = plain_script(__doc__, run_diagnosis, DiagnoseOptions)


if __name__ == "__main__":
    main.run()
