"""Train a LoRA for HunyuanImage-2.1."""

import modules.interpreter  # noqa: F401
from hunyuan_image.options import TRAINER
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(**TRAINER)
main = training_script("hunyuan_image", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
