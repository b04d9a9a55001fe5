"""Store a transformer or text encoder in 8 bits once, or a quantized one in 16 bits again."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from checkpoints.quantizing import QuantizeOptions, quantize_file
from protocols.families import plain_script

main = plain_script(__doc__, quantize_file, QuantizeOptions)


if __name__ == "__main__":
    main.run()
