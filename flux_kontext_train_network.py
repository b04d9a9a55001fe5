"""Train a LoRA for FLUX.1 Kontext. All options: python flux_kontext_train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_kontext", __doc__)


if __name__ == "__main__":
    main.run()
