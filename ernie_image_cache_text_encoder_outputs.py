"""Encode the captions of a dataset with ERNIE-Image's text encoder (Ministral 3), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ernie_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
