"""Train a ControlNet for Stable Diffusion 1.x or 2.x."""

import modules.interpreter  # noqa: F401
from stable_diffusion.training_options import REJECTED, SHOWN_AS_CONTROL_NET
from training.image_options import control_trainer
from training.scripts import training_script

DEFAULTS = control_trainer("a ControlNet", shown_as=SHOWN_AS_CONTROL_NET, refused=REJECTED)
main = training_script(
    "sd1",
    __doc__,
    script="train_control_net.py",
    kind="ControlNetTraining",
    images=DEFAULTS,
)

if __name__ == "__main__":
    main.run()
