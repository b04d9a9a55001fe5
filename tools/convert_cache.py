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
from dataset.convert_options import ConvertCacheOptions, add_convert_cache_arguments
from modules.command import command_line
from modules.options import read_options
from modules.parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_convert_cache_arguments(parser)
    options = read_options(ConvertCacheOptions, parser.parse_args(argv))
    config = None if options.dataset_config is None else load_dataset_config(options.dataset_config)

    from dataset.cache.converting import convert_caches

    convert_caches(options, config)


if __name__ == "__main__":
    command_line(main)
