"""The old name of tools/share_page.py."""

import modules.interpreter  # noqa: F401
from tools.share_page import main

if __name__ == "__main__":
    main.run()
