"""Encode the captions of a dataset with Z-Image's text encoder (Qwen3), for training.

All options: python zimage_cache_text_encoder_outputs.py --help
"""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("z_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
