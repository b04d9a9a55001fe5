"""Encode the captions of a dataset with Kandinsky's text encoders, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("kandinsky", "texts", __doc__)


if __name__ == "__main__":
    main.run()
