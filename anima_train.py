"""Fine-tune the whole transformer of Anima."""

import modules.interpreter  # noqa: F401
from anima.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

main = training_script(
    "anima", __doc__, full_dit=True, kind="FullTraining", images=ImageTrainerDefaults(**TRAINER)
)


if __name__ == "__main__":
    main.run()
