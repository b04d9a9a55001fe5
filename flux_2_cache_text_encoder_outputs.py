"""Encode the captions of a dataset with FLUX.2's text encoder (Mistral Small 3 or Qwen3), for training.

All options: python flux_2_cache_text_encoder_outputs.py --help
"""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_2", "texts", __doc__)


if __name__ == "__main__":
    main.run()
