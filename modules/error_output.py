"""Find the error message in the output of one of our programs that has failed."""

import re

from modules.command import LISTS_OPTIONS

MAX_SAID = 2000  # maximum characters of a message
# beginning of the line with the error: a kind of error, or the program's name in a checkout
# (x.py) or the package (a_name, reelsmith x y)
ERROR_LINE = re.compile(
    r"^(?:[\w.]+Error|\w+\.py: error|[^\W_]+_\w+: error|reelsmith(?: [\w-]+)+: error): ", re.MULTILINE
)


def extract_error_message(errors: str) -> str:
    """Return the message of the error that ended one of our programs, without the name of its class.

    Args:
        errors: The program's standard error output.
    """
    last = errors.rpartition("Traceback (most recent call last):")[2]
    match = ERROR_LINE.search(last)
    if match is None:
        return errors.strip()[-MAX_SAID:]
    message = last[match.end() :].partition("\n\n")[0].strip()
    return re.sub(rf"\n[^\n]*{LISTS_OPTIONS}$", "", message)[:MAX_SAID]
