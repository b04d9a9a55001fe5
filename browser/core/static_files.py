"""The scripts and style sheets of the pages, which a page names with the digest of their content.

A browser may still have a script of the same name that a server of another account sent from this address. It
runs a script only if its content has the digest in the page.
"""

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

from browser.core.language_tables import CODES, write_script
from modules.pages.page import HERE as PAGES

# by name, wherever they stand: those of a page are in its folder
STATIC = {path.name: path for path in Path(__file__).resolve().parent.parent.rglob("*.[cj]s*")}
STATIC |= {name: PAGES / name for name in ("page.js", "pages.css")}
# in our templates
_NAMED = re.compile(r'(?<=\s)(?:src|href)="/(?:static/(?P<name>[\w.-]+)|language/(?P<language>\w+)\.js)"')


def add_digests(page: str) -> str:
    """Return an HTML page that names each script and style sheet with its digest (Subresource Integrity)."""
    return _NAMED.sub(_add_digest, page)


def _add_digest(match: re.Match[str]) -> str:
    path = STATIC.get(match["name"])
    if match["language"] in CODES:
        digest = _compute_digest(write_script(match["language"]).encode())
    elif path is not None:
        digest = _read_digest(path, path.stat().st_mtime_ns)
    else:
        return match[0]
    return f'{match[0]} integrity="{digest}"'


@cache
def _read_digest(path: Path, version: int) -> str:
    """Return the digest of a file; `version` is its time of modification."""
    return _compute_digest(path.read_bytes())


def _compute_digest(content: bytes) -> str:
    """Return the SHA-256 of a script or style sheet as browsers compare it."""
    return f"sha256-{b64encode(hashlib.sha256(content).digest()).decode()}"
