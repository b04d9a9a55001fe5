"""Train a LoRA for Anima."""

import modules.interpreter  # noqa: F401
from anima.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(**TRAINER)
main = training_script("anima", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
