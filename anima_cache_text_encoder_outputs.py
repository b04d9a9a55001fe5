"""Encode the captions of a dataset for Anima: with Qwen3 (0.6B), and T5's tokenizer, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("anima", "texts", __doc__)


if __name__ == "__main__":
    main.run()
