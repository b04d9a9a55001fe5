"""Train a ControlNet-LLLite for Anima."""

import modules.interpreter  # noqa: F401
from anima.options import TRAINER
from training.image_options import ImageTrainerDefaults, block_control_net_trainer
from training.scripts import training_script

DEFAULTS = block_control_net_trainer("a ControlNet-LLLite", ImageTrainerDefaults(**TRAINER))
main = training_script(
    "anima",
    __doc__,
    script="anima_train_control_net_lllite.py",
    kind="LlliteTraining",
    images=DEFAULTS,
)


if __name__ == "__main__":
    main.run()
