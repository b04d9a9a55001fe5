"""Fine-tune a whole checkpoint of Stable Diffusion XL."""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import CHECKPOINT_TRAINER
from training.scripts import training_script

main = training_script(
    "sdxl",
    __doc__,
    full_dit=True,
    script="sdxl_train.py",
    kind="FullTraining",
    images=replace(CHECKPOINT_TRAINER, shown_as=SHOWN_AS),
)

if __name__ == "__main__":
    main.run()
