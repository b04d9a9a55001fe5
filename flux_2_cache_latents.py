"""Encode the images and references of a dataset with FLUX.2's autoencoder, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_2", "latents", __doc__)


if __name__ == "__main__":
    main.run()
