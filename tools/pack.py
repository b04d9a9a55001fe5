"""Make one file of a folder that `new` described, for another machine: media, captions, caches, settings.

Paths of this machine, keys and tokens are left out.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from project.packing import PackOptions
from protocols.families import plain_script

main = plain_script(__doc__, "project.packing.pack_folder", PackOptions)


if __name__ == "__main__":
    main.run()
