"""Train a ControlNet for Stable Diffusion XL."""

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import REJECTED, SHOWN_AS_CONTROL_NET
from training.image_options import control_trainer
from training.scripts import training_script

DEFAULTS = control_trainer("a ControlNet", shown_as=SHOWN_AS_CONTROL_NET, refused=REJECTED)
main = training_script(
    "sdxl",
    __doc__,
    script="sdxl_train_control_net.py",
    kind="ControlNetTraining",
    images=DEFAULTS,
)

if __name__ == "__main__":
    main.run()
