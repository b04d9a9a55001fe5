"""Run any command of Reelsmith, or list them without arguments."""

from pathlib import Path

import modules.interpreter  # noqa: F401
from package.reelsmith.commands import main

# so that `python -m reelsmith.wan_train_network`, typed in this folder, finds the script
__path__ = [str(Path(__file__).resolve().parent)]

if __name__ == "__main__":
    main()
