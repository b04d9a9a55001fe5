"""Encode the images and clips of a dataset with the VAE of HunyuanVideo or SkyReels V1, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("hunyuan_video", "latents", __doc__)


if __name__ == "__main__":
    main.run()
