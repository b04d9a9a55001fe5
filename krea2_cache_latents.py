"""Encode the images of a dataset with Krea 2's VAE, that of Qwen-Image, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("krea2", "latents", __doc__)


if __name__ == "__main__":
    main.run()
