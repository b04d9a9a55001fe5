"""Write an HTML page: one file that needs no server, runs no script and fetches nothing.

A page is a Jinja2 template beside the code that fills it. It extends `base.html` of this folder:

    {% extends "base.html" %}{% block body %}<p>{{ prompt }}</p>{% endblock %}

Every value is escaped; only `Markup` from `embedding` and `charts` is HTML.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from modules.atomic_write import write_text
from modules.pages.sharing import mark_folders

HERE = Path(__file__).resolve().parent
# Nothing is fetched and no script runs, even if a text from outside were not escaped.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def render_page(template: Path, title: str, values: Mapping[str, Any]) -> str:
    """Return the page that `template` makes of these values, which are escaped.

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
