"""Make regularization images of a class with the base model of a folder that `new` described.

The captions are those of the folder's dataset.toml with the class word in place of the trigger word. The
images go into FOLDER/regularization_images, and dataset.toml gets them as is_reg (docs/image_datasets.md).
Images that are there stay, so a run that was stopped continues if it is started again.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from project.regularization import RegularizationOptions
from protocols.families import plain_script

main = plain_script(
    __doc__,
    "project.regularizing.make_regularization_images",
    RegularizationOptions,
    advice_after_interrupt=lambda options: "What was made is kept: type the same command to continue.",
)


if __name__ == "__main__":
    main.run()
