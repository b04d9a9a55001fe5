"""Train a LoRA for FLUX.1 Kontext."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_kontext", __doc__)


if __name__ == "__main__":
    main.run()
