"""Train a LoRA for Krea 2."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("krea2", __doc__)


if __name__ == "__main__":
    main.run()
