"""Encode the images of a dataset with FLUX.2's autoencoder for the training of Ideogram 4."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ideogram4", "latents", __doc__)


if __name__ == "__main__":
    main.run()
