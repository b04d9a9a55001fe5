"""Encode the captions of a dataset with the text encoders of Stable Diffusion 1.x and 2.x, for training.

All options: python sd_cache_text_encoder_outputs.py --help
"""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("sd1", "texts", __doc__)


if __name__ == "__main__":
    main.run()
