"""Convert the caches of a dataset between single files and shards, byte for byte."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from dataset.config import load_dataset_config
from dataset.options import ConvertCacheOptions
from protocols.families import plain_script

main = plain_script(
    __doc__,
    "dataset.cache.converting.convert_caches",
    ConvertCacheOptions,
    prepare=lambda options: (
        options,
        options.dataset_config and load_dataset_config(options.dataset_config),
    ),
)


if __name__ == "__main__":
    main.run()
