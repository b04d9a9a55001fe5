"""Train a LoRA for FLUX 3 Image Klein."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_3", __doc__)


if __name__ == "__main__":
    main.run()
