"""Tokenize the captions of a dataset for HiDream-O1-Image, which embeds the tokens itself, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("hidream_o1", "texts", __doc__)


if __name__ == "__main__":
    main.run()
