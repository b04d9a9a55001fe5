"""Train a LoRA for FLUX.1 and Chroma. All options: python flux_train_network.py --help"""

import modules.interpreter  # noqa: F401
from flux.options import USUAL_GUIDANCE
from modules.speed_options import take_ae
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="sigma",
    discrete_flow_shift=3.0,
    model_prediction_type="sigma_scaled",
    guidance_scale=USUAL_GUIDANCE,
    translate=take_ae,
    tokenizers={"clip_l_tokenizer": "openai_clip-vit-large-patch14", "t5xxl_tokenizer": "google_t5-v1_1-xxl"},
)
main = training_script("flux", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
