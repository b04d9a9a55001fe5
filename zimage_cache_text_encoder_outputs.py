"""Encode the captions of a dataset with Z-Image's text encoder (Qwen3), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("z_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
