"""Encode the captions of a dataset with Ideogram 4's text encoder (Qwen3-VL 8B), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ideogram4", "texts", __doc__)


if __name__ == "__main__":
    main.run()
