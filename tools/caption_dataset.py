"""Write captions for a dataset with a vision-language model, or edit the captions that are there.

Every image or clip of the dataset that has no caption gets one: a text file next to it, or in a JSONL list
the "caption" of its line, where all else stays (the list as it was becomes .bak). What a person wrote is
kept: the hidden file .captions_made.jsonl next to the captions says which of them this program wrote.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.captions.run import CaptioningOptions
from dataset.config import load_dataset_config
from protocols.families import plain_script

main = plain_script(
    __doc__,
    "data_tools.captions.run.run_captioning",
    CaptioningOptions,
    prepare=lambda options: (load_dataset_config(options.dataset_config), options),
)


if __name__ == "__main__":
    main.run()
