"""Train a LoRA for Stable Diffusion XL. All options: python sdxl_train_network.py --help"""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import NOISE_TRAINER
from training.scripts import training_script

main = training_script("sdxl", __doc__, images=replace(NOISE_TRAINER, shown_as=SHOWN_AS))


if __name__ == "__main__":
    main.run()
