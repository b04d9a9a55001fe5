"""Train a LoRA for Qwen-Image-2.1."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("qwen_image_21", __doc__)


if __name__ == "__main__":
    main.run()
