"""Train a LoRA for Stable Diffusion 1.x and 2.x. All options: python train_network.py --help"""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import NOISE_TRAINER
from training.scripts import training_script

main = training_script("sd1", __doc__, images=replace(NOISE_TRAINER, shown_as=SHOWN_AS))


if __name__ == "__main__":
    main.run()
