"""Caption a folder with a GIT model, by the options of sd-scripts.

tools/caption_dataset.py has more.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from data_tools.folder_captions import GitCaptionOptions, caption_folder_by_git
from protocols.families import plain_script

main = plain_script(__doc__, caption_folder_by_git, GitCaptionOptions)


if __name__ == "__main__":
    main.run()
