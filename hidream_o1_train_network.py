"""Train a LoRA for HiDream-O1-Image."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("hidream_o1", __doc__)


if __name__ == "__main__":
    main.run()
