"""Encode the captions of a dataset with MOSS-Image's text encoder (Qwen3.5), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("moss_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
