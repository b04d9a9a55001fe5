"""Encode the images and references of a dataset with FLUX 3's autoencoder, that of FLUX.2, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_3", "latents", __doc__)


if __name__ == "__main__":
    main.run()
