"""Encode the captions of a dataset with the text encoders of HunyuanImage-2.1, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("hunyuan_image", "texts", __doc__)


if __name__ == "__main__":
    main.run()
