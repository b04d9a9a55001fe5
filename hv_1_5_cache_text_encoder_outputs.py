"""Encode the captions of a dataset with HunyuanVideo 1.5's text encoders, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("hunyuan_video_1_5", "texts", __doc__)


if __name__ == "__main__":
    main.run()
