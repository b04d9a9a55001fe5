"""The old name of tools/prepare_dataset.py."""

import modules.interpreter  # noqa: F401
from tools.prepare_dataset import main

if __name__ == "__main__":
    main.run()
