"""Encode the images and references of a dataset with Fibo 2.0's autoencoder, FLUX.2's, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("fibo_2", "latents", __doc__)


if __name__ == "__main__":
    main.run()
