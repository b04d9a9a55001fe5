"""Train a LoRA for LTX-2 and LTX-2.3, with or without sound.

All options: python ltx2_train_network.py --help
"""

import modules.interpreter  # noqa: F401
from training.noise_options import SAMPLERS, SHIFTED_LOGIT
from training.scripts import training_script

main = training_script("ltx_2", __doc__, samplers=(*SAMPLERS, SHIFTED_LOGIT))


if __name__ == "__main__":
    main.run()
