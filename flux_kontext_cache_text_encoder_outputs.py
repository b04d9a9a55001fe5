"""Encode the captions of a dataset with the text encoders of FLUX.1 Kontext, for training.

All options: python flux_kontext_cache_text_encoder_outputs.py --help
"""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_kontext", "texts", __doc__)


if __name__ == "__main__":
    main.run()
