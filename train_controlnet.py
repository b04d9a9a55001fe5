"""Train a ControlNet for Stable Diffusion 1.x or 2.x: the old name of train_control_net.py."""

import modules.interpreter  # noqa: F401
from train_control_net import main

if __name__ == "__main__":
    main.run()
