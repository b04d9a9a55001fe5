"""Encode the images of a dataset with the VAE of Stable Diffusion 1.x and 2.x, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("sd1", "latents", __doc__)


if __name__ == "__main__":
    main.run()
