"""Encode the images and clips of a dataset with Wan2.1's VAE, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("wan", "latents", __doc__)


if __name__ == "__main__":
    main.run()
