"""Encode the captions of a dataset with Gemma 3 and LTX-2's connectors, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ltx_2", "texts", __doc__)


if __name__ == "__main__":
    main.run()
