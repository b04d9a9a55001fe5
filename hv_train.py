"""Fine-tune the whole transformer of HunyuanVideo and SkyReels V1. All options: python hv_train.py --help"""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("hunyuan_video", __doc__, full_dit=True)


if __name__ == "__main__":
    main.run()
