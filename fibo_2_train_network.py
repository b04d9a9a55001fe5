"""Train a LoRA for Fibo 2.0. All options: python fibo_2_train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("fibo_2", __doc__)


if __name__ == "__main__":
    main.run()
