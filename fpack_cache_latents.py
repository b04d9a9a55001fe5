"""Encode the clips or images of a dataset with FramePack's VAE and image encoder, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("framepack", "latents", __doc__)


if __name__ == "__main__":
    main.run()
