"""Encode the captions of a dataset with the text encoders of FLUX.1 or Chroma, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux", "texts", __doc__)


if __name__ == "__main__":
    main.run()
