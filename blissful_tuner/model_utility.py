"""Look into model files of any size, and rewrite them: other dtype, names, one file or several."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from blissful_tuner.model_work import ModelFunctions, ModelUtilityOptions, work
from modules.command import command_line
from modules.script_options import parse_options
from networks.metadata import STALE, describe_lora, lora_hashes
from protocols.families import identify


def main(argv: Sequence[str] | None = None) -> None:
    """Describe a model file, and rewrite it if the options request it.

    Raises UserError if the file cannot be read or written.
    """
    (options,) = parse_options(__doc__, argv, ModelUtilityOptions)
    work(options, ModelFunctions(identify, describe_lora, lora_hashes, STALE))


if __name__ == "__main__":
    command_line(main, explain=identify)
