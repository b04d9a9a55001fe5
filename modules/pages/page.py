"""Write an HTML page: one file that needs no server, runs no script and fetches nothing.

A page is a Jinja2 template beside the code that fills it. It extends `base.html` of this folder:

    {% extends "base.html" %}{% block body %}<p>{{ prompt }}</p>{% endblock %}

Every value is escaped; only `Markup` from `embedding` and `charts` is HTML.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from modules.atomic_write import write_text
from modules.errors import UserError
from modules.text_files import require_regular_file

logger = logging.getLogger(__name__)


# Make a copy of a page to give to others: without folders, commands, and links to files beside it.
#
# Templates put what is private between `PRIVATE` and `END`; `mark_folders` does so in all texts of a page.
GENERATOR = '<meta name="generator" content="reelsmith">'  # of base.html
PRIVATE, END = Markup("<!--private-->"), Markup("<!--/private-->")  # escaped texts cannot hold them
# a drive, the root or the home folder, and all folders below it; their names may hold blanks inside
_FOLDERS = re.compile(
    r"""(?<![\w:/\\.~-])(?:[A-Za-z]:[\\/]|~?[\\/]+)(?:[^\\/\s:*?"<>|](?:[^\\/\n:*?"<>|]*[^\\/\s:*?"<>|])?[\\/]+)+"""
)
_MARKED = re.compile(rf"{PRIVATE}(?:(?!{PRIVATE}).)*?{END}\n?", re.DOTALL)
_FILE_LINK = re.compile(r'<a href="\./[^"]*">')


def mark_folders(value: Any) -> Any:
    """Return a value of a page with the folders of absolute paths marked as private."""
    if isinstance(value, Markup) or not isinstance(value, (str, Path)):
        return value
    text, end = str(value), 0
    parts = []
    for found in _FOLDERS.finditer(text):
        parts += [escape(text[end : found.start()]), PRIVATE, escape(found[0]), END]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])]) if parts else text


def share_page(page: Path, copy: Path) -> None:
    """Write a copy of a page without private facts. Raises UserError if it is no page of ours."""
    try:
        require_regular_file(page)
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page} cannot be read ({error}). Give a page that this program wrote.") from None
    if GENERATOR not in text[:2000]:
        raise UserError(f"{page} is not a page of this program, or an older one. Make it again.")
    count = 1
    while count:  # the innermost ones first: folders are marked in commands too
        text, count = _MARKED.subn("", text)
    write_text(copy, _FILE_LINK.sub("<a>", text))
    logger.info("wrote %s", copy)


HERE = Path(__file__).resolve().parent
# Nothing is fetched and no script runs, even if a text from outside were not escaped.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def render_page(template: Path, title: str, values: Mapping[str, Any]) -> str:
    """Return the page of `template` with these values, which are escaped.

    Raises jinja2.UndefinedError if the template names a value that is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=mark_folders,
    )
    return environment.get_template(template.name).render({**values, "title": title, "policy": POLICY})


def write_page(path: Path, template: Path, title: str, values: Mapping[str, Any]) -> None:
    """Write a page, completely or not at all. Raises OutputError if the file cannot be written."""
    write_text(path, render_page(template, title, values))
