"""Encode the captions of a dataset with the text encoders of HunyuanVideo or SkyReels V1, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("hunyuan_video", "texts", __doc__)


if __name__ == "__main__":
    main.run()
