"""Train a LoRA for FLUX.1 and Chroma."""

import modules.interpreter  # noqa: F401
from flux.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(**TRAINER)
main = training_script("flux", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
