"""Encode the images of a dataset with Qwen-Image's VAE, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("qwen_image", "latents", __doc__)


if __name__ == "__main__":
    main.run()
