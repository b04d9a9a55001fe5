"""Encode the captions of a dataset with FramePack's text encoders, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("framepack", "texts", __doc__)


if __name__ == "__main__":
    main.run()
