"""Train a LoRA for Anima. All options: python anima_train_network.py --help"""

import modules.interpreter  # noqa: F401
from anima.options import translate_training
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="sigmoid",
    discrete_flow_shift=1.0,
    model_prediction_type="raw",
    translate=translate_training,
    tokenizers={"t5_tokenizer_path": "google_t5-v1_1-xxl", "qwen3_tokenizer": "Qwen_Qwen3-0.6B-Base"},
)
main = training_script("anima", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
