"""Train a LoRA for Qwen-Image."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("qwen_image", __doc__)


if __name__ == "__main__":
    main.run()
