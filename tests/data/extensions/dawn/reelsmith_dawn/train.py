"""Train a LoRA for Dawn."""

import reelsmith.modules.interpreter  # noqa: F401
from reelsmith.training.learning_options import ExpertTrainingOptions
from reelsmith.training.scripts import training_script

main = training_script("dawn", __doc__, extra_options=[ExpertTrainingOptions])


if __name__ == "__main__":
    main.run()
