"""Convert the caches of a dataset between single files and shards, byte for byte.

All options: python tools/convert_cache.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import ConvertCacheOptions
from modules.command import command_line
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, ConvertCacheOptions)
    config = None if options.dataset_config is None else load_dataset_config(options.dataset_config)

    from dataset.cache.converting import convert_caches

    convert_caches(options, config)


if __name__ == "__main__":
    command_line(main)
