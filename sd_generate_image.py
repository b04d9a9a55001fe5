"""Generate images with Stable Diffusion 1.x and 2.x."""

import modules.interpreter  # noqa: F401
from generation.scripts import generation_script
from stable_diffusion.sd1.options import GENERATION as DEFAULTS

main = generation_script("sd1", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
