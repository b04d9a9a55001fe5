"""Run any command of Reelsmith, or list them without arguments. `import reelsmith` has them as functions."""

from pathlib import Path
from typing import TYPE_CHECKING

import modules.interpreter  # noqa: F401
from package.checkout_names import join_names
from package.reelsmith import __all__, __dir__, __getattr__  # noqa: F401
from package.reelsmith.commands import main

if TYPE_CHECKING:
    from package.reelsmith.api import *  # noqa: F403

# so that `python -m reelsmith.wan_train_network`, typed in this folder, finds the script
__path__ = [str(Path(__file__).resolve().parent)]
# so that an extension imports `reelsmith.training` here as from the installed package
join_names()

if __name__ == "__main__":
    main()
