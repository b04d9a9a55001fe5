"""Encode the captions of a dataset with Qwen-Image's text encoder (Qwen2.5-VL), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("qwen_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
