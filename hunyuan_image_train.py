"""Fine-tune the whole transformer of HunyuanImage-2.1."""

import modules.interpreter  # noqa: F401
from hunyuan_image.options import TRAINER, translate_attention
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

main = training_script(
    "hunyuan_image",
    __doc__,
    full_dit=True,
    images=ImageTrainerDefaults(**{**TRAINER, "translate": translate_attention}),
)


if __name__ == "__main__":
    main.run()
