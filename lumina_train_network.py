"""Train a LoRA for Lumina-Image-2.0."""

import modules.interpreter  # noqa: F401
from lumina.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(**TRAINER)
main = training_script("lumina", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
