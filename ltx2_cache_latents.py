"""Encode the clips of a dataset with LTX-2's VAEs, images and sound, for training."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("ltx_2", "latents", __doc__)


if __name__ == "__main__":
    main.run()
