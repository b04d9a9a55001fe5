"""Links of a training's page, and how its grid gets the clips."""

from collections.abc import Callable
from urllib.parse import quote

from markupsafe import Markup

# file of a sample, prompt, step, whether it is one of the newest -> the clip, or why there is none
LoadClip = Callable[[str, str, int, bool], Markup | str]


def link(*parts: str) -> str:
    """Return the relative address of a file. parts: folders and the file's name."""
    return "./" + "/".join(quote(part.encode("utf-8", "surrogateescape"), safe="") for part in parts)
