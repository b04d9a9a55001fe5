"""Refuse a Python that cannot run Reelsmith.

Every script imports this before any other of our modules. The checks run at import, because the next imports
need modules and syntax of Python 3.11: this file has to be readable by older ones. Newer ones are refused
too, as they are untested. Then `--help` and wrong options of the running script are answered from its table,
before the modules of the script are imported.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(
        f"Python {sys.version.split()[0]} ({sys.executable}) is not supported: use 3.11 to 3.14.\nCreate an "
        "environment with one of them: see docs/install.md."
    )
if sys.maxsize < 2**32:
    sys.exit(
        f"This Python ({sys.executable}) is 32-bit, and PyTorch supports only 64-bit.\nInstall a 64-bit "
        "Python: see docs/install.md."
    )

from modules.early_errors import explain_early_errors  # noqa: E402  # both need the Python that is checked

explain_early_errors()

from modules.table_answers import answer_running_script  # noqa: E402  # after it, as it takes a moment

answer_running_script()
