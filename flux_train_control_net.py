"""Train a ControlNet for FLUX.1."""

import modules.interpreter  # noqa: F401
from flux.options import CONTROL_NET_REJECTED, TRAINER, translate_older_options
from training.image_options import (
    OTHER_TRAINERS_OPTIONS,
    ImageTrainerDefaults,
    ManyWeightsOptions,
    control_net_trainer,
)
from training.scripts import training_script

DEFAULTS = control_net_trainer(
    "a ControlNet",
    ImageTrainerDefaults(
        **{**TRAINER, "translate": translate_older_options},
        foreign=(*OTHER_TRAINERS_OPTIONS, ManyWeightsOptions),
    ),
    refused=CONTROL_NET_REJECTED,
)
main = training_script(
    "flux",
    __doc__,
    script="flux_train_control_net.py",
    kind="ControlNetTraining",
    images=DEFAULTS,
)


if __name__ == "__main__":
    main.run()
