"""Train a LoRA for Stable Diffusion XL from prompts alone: erase or enhance a concept (LECO)."""

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import leco_trainer
from training.scripts import training_script

DEFAULTS = leco_trainer(shown_as=SHOWN_AS)
main = training_script("sdxl", __doc__, script="sdxl_train_leco.py", images=DEFAULTS)

if __name__ == "__main__":
    main.run()
