"""Train a LoRA for FLUX.2 dev or klein."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_2", __doc__)


if __name__ == "__main__":
    main.run()
