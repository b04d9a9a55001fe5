"""Encode the images and clips of a dataset with Kandinsky's VAE, and the sound of clips, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("kandinsky", "latents", __doc__)


if __name__ == "__main__":
    main.run()
