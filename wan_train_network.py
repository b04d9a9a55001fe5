"""Train a LoRA for Wan2.1 and Wan2.2. All options: python wan_train_network.py --help"""

import modules.interpreter  # noqa: F401
from training.expert_options import add_expert_training_arguments
from training.scripts import training_script

main = training_script("wan", __doc__, add_more=add_expert_training_arguments)


if __name__ == "__main__":
    main.run()
