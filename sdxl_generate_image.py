"""Generate images with Stable Diffusion XL."""

import modules.interpreter  # noqa: F401
from generation.scripts import generation_script
from stable_diffusion.sdxl.options import GENERATION as DEFAULTS

main = generation_script("sdxl", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
