"""Encode clips with their sound, or images, for training MiniMax-H3."""

import modules.interpreter  # noqa: F401
from dataset.scripts import caching_script

main = caching_script("minimax_h3", "latents", __doc__)


if __name__ == "__main__":
    main.run()
