"""Encode the images and references of a dataset with the autoencoder of FLUX.1 Kontext, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("flux_kontext", "latents", __doc__)


if __name__ == "__main__":
    main.run()
