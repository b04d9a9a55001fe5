"""Write the names of the options of all scripts, which tell a mistyped option from one of another script:

python -m tests.option_names
"""

import pytest

from modules import mistyped
from tests.test_command_line import parser_of
from tests.test_imports import SCRIPTS, TOOLS


def collect_names() -> str:
    """Return the content of modules/option_names.txt: all options, sorted, a line each."""
    names = set()
    for script in [*SCRIPTS, *TOOLS]:
        with pytest.MonkeyPatch.context() as patch:
            flags = parser_of(script, patch)._option_string_actions
        names |= {flag[2:].replace("-", "_") for flag in flags if flag[:2] == "--"}
    return "".join(f"{name}\n" for name in sorted(names))


if __name__ == "__main__":
    mistyped._NAMES.write_text(collect_names(), encoding="utf-8")
