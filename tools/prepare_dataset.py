"""Prepare clips and captions in CogVideoX form: the folders that load_tensors of a dataset reads."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.cogvideox.clips import PrepareOptions
from protocols.families import plain_script

main = plain_script(__doc__, "data_tools.cogvideox.preparing.prepare", PrepareOptions)


if __name__ == "__main__":
    main.run()
