"""Train a LoRA for ERNIE-Image."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("ernie_image", __doc__)


if __name__ == "__main__":
    main.run()
