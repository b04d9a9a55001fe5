"""Fine-tune a whole checkpoint of Stable Diffusion 1.x or 2.x, also with class images (DreamBooth)."""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import CHECKPOINT_TRAINER
from training.scripts import training_script

main = training_script(
    "sd1",
    __doc__,
    full_dit=True,
    script="train_db.py",
    kind="DreamBooth",
    images=replace(CHECKPOINT_TRAINER, shown_as=SHOWN_AS),
)

if __name__ == "__main__":
    main.run()
