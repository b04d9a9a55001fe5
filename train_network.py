"""Train a LoRA for Stable Diffusion 1.x and 2.x. All options: python train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.image_options import NOISE_TRAINER
from training.scripts import training_script

main = training_script("sd1", __doc__, images=NOISE_TRAINER)


if __name__ == "__main__":
    main.run()
