"""Train a LoRA for HunyuanVideo and SkyReels V1."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("hunyuan_video", __doc__)


if __name__ == "__main__":
    main.run()
