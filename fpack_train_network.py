"""Train a LoRA for FramePack and FramePack-F1."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("framepack", __doc__)


if __name__ == "__main__":
    main.run()
