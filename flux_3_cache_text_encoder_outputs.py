"""Encode the captions of a dataset with FLUX 3's text encoder (Qwen3-VL), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_3", "texts", __doc__)


if __name__ == "__main__":
    main.run()
