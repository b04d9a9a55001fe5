"""Train a LoRA for Fibo 2.0."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("fibo_2", __doc__)


if __name__ == "__main__":
    main.run()
