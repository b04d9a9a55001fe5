"""Encode the captions of a dataset with the text encoder of Lumina-Image-2.0 (Gemma 2), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("lumina", "texts", __doc__)


if __name__ == "__main__":
    main.run()
