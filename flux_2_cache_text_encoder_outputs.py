"""Encode the captions of a dataset with FLUX.2's text encoder (Mistral Small 3 or Qwen3), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_2", "texts", __doc__)


if __name__ == "__main__":
    main.run()
