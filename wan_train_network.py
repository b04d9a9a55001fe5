"""Train a LoRA for Wan2.1 and Wan2.2."""

import modules.interpreter  # noqa: F401
from training.learning_options import ExpertTrainingOptions
from training.scripts import training_script

main = training_script("wan", __doc__, extra_options=[ExpertTrainingOptions])


if __name__ == "__main__":
    main.run()
