"""Train a LoRA for Lumina-Image-2.0. All options: python lumina_train_network.py --help"""

import modules.interpreter  # noqa: F401
from lumina.options import translate_training
from training.image_options import ImageTrainerDefaults
from training.scripts import training_script

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="shift",
    discrete_flow_shift=6.0,
    model_prediction_type="raw",
    samplers=("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),
    translate=translate_training,
    tokenizers={"gemma2_tokenizer": "google_gemma-2-2b"},
)
main = training_script("lumina", __doc__, images=DEFAULTS)


if __name__ == "__main__":
    main.run()
