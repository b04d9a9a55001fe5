"""Fine-tune the whole transformer of Z-Image. All options: python zimage_train.py --help"""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("z_image", __doc__, full_dit=True)


if __name__ == "__main__":
    main.run()
