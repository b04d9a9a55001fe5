"""Encode the images of a dataset with the VAE of Anima (Qwen-Image's), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("anima", "latents", __doc__)


if __name__ == "__main__":
    main.run()
