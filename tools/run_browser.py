"""Open the page in a web browser: describe, train, generate, models, datasets, a queue."""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from browser.core.options import BrowserOptions
from protocols.families import plain_script

main = plain_script(__doc__, "browser.core.serving.run_browser", BrowserOptions)


if __name__ == "__main__":
    main.run()
