"""Encode the images and references of a dataset with MOSS-Image's autoencoder, FLUX.2's, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("moss_image", "latents", __doc__)


if __name__ == "__main__":
    main.run()
