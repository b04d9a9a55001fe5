"""Train a LoRA for HunyuanImage-2.1. All options: python hunyuan_image_train_network.py --help"""

import modules.interpreter  # noqa: F401
from hunyuan_image.options import translate_training
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="sigma",
    discrete_flow_shift=5.0,
    model_prediction_type="raw",
    translate=translate_training,
    tokenizers={"text_encoder_tokenizer": "Qwen_Qwen2.5-VL-7B-Instruct"},
)
main = training_script("hunyuan_image", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
