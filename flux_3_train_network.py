"""Train a LoRA for FLUX 3 Image Klein. All options: python flux_3_train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_3", __doc__)


if __name__ == "__main__":
    main.run()
