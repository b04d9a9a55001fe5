"""Cache the latents of the images of a metadata file, with which fine_tune.py and train_network.py train."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.bucket_latents import BucketLatentOptions, prepare_bucket_latents
from protocols.families import plain_script

main = plain_script(__doc__, prepare_bucket_latents, BucketLatentOptions)


if __name__ == "__main__":
    main.run()
