"""Train a LoRA for Stable Diffusion XL."""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import NOISE_TRAINER
from training.scripts import training_script

DEFAULTS = replace(NOISE_TRAINER, shown_as=SHOWN_AS)
main = training_script("sdxl", __doc__, images=DEFAULTS)

if __name__ == "__main__":
    main.run()
