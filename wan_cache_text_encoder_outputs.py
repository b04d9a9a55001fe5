"""Encode the captions of a dataset with Wan2.1's text encoder, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("wan", "texts", __doc__)


if __name__ == "__main__":
    main.run()
