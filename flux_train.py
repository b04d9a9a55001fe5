"""Fine-tune the whole transformer of FLUX.1 or Chroma."""

import modules.interpreter  # noqa: F401
from flux.options import TRAINER, translate_older_options
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

main = training_script(
    "flux",
    __doc__,
    full_dit=True,
    kind="FullTraining",
    images=ImageTrainerDefaults(**{**TRAINER, "translate": translate_older_options}),
)


if __name__ == "__main__":
    main.run()
