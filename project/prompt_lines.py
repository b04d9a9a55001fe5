"""Lines of prompts.txt: a prompt on one line, followed by its options such as `--w 832 --d 7`."""

import re
from collections.abc import Mapping
from typing import Any

from modules.control_codes import drop_control_codes

# Two dashes begin an option of the line. A single dash does so by mistake in `-w 512`, which the reader of
# lines rejects, but not in `-5` or `-style`.
_OPTION_START = re.compile(r"(^|\s)(?:--+|[-\u2010-\u2015\u2212]+(?=[A-Za-z_]+ [0-9]))")


def plain(text: str) -> str:
    """Return a prompt on one line, without characters that would start options or comments in prompts.txt."""
    on_one_line = " ".join(drop_control_codes(text).split())
    return " ".join(_OPTION_START.sub(r"\1", on_one_line).lstrip("#").split())


def format_options(options: Mapping[str, Any]) -> str:
    """Return the options of a line, given by their letters, as text."""
    return " ".join(f"--{letter} {value}" for letter, value in options.items())
