"""Fine-tune the whole transformer of Lumina-Image-2.0."""

import modules.interpreter  # noqa: F401
from lumina.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

main = training_script("lumina", __doc__, full_dit=True, images=ImageTrainerDefaults(**TRAINER))


if __name__ == "__main__":
    main.run()
