"""Train a new word with vectors for each cross-attention of Stable Diffusion 1.x or 2.x (XTI)."""

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import word_trainer
from training.scripts import training_script

DEFAULTS = word_trainer(shown_as=SHOWN_AS)
main = training_script(
    "sd1",
    __doc__,
    script="train_textual_inversion_XTI.py",
    kind="ExtendedInversionTraining",
    images=DEFAULTS,
)

if __name__ == "__main__":
    main.run()
