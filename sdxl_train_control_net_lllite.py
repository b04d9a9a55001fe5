"""Train a ControlNet-LLLite for Stable Diffusion XL."""

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import control_trainer
from training.scripts import training_script

DEFAULTS = control_trainer(
    "a ControlNet-LLLite",
    shown_as=SHOWN_AS,
    settings={
        "network_dim": {
            "help": "numbers that a layer's input becomes; default: of --network_weights, else 64"
        },
        "network_dropout": {"help": "fraction of these values that is set to zero during training"},
        "network_weights": {"help": "file of a ControlNet-LLLite to start from"},
    },
)
main = training_script(
    "sdxl",
    __doc__,
    script="sdxl_train_control_net_lllite.py",
    kind="LlliteTraining",
    images=DEFAULTS,
)

if __name__ == "__main__":
    main.run()
