"""Train a LoRA for FLUX.1 and Chroma. All options: python flux_train_network.py --help"""

import modules.interpreter  # noqa: F401
from flux.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

main = training_script("flux", __doc__, images=ImageTrainerDefaults(**TRAINER))


if __name__ == "__main__":
    main.run()
