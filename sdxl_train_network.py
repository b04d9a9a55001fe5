"""Train a LoRA for Stable Diffusion XL. All options: python sdxl_train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.image_options import NOISE_TRAINER
from training.scripts import training_script

main = training_script("sdxl", __doc__, images=NOISE_TRAINER)


if __name__ == "__main__":
    main.run()
