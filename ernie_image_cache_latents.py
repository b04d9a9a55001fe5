"""Encode the images of a dataset with ERNIE-Image's autoencoder, which is FLUX.2's, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ernie_image", "latents", __doc__)


if __name__ == "__main__":
    main.run()
