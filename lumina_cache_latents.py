"""Encode the images of a dataset with the autoencoder of Lumina-Image-2.0 (FLUX's), for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("lumina", "latents", __doc__)


if __name__ == "__main__":
    main.run()
