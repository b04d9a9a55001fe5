"""Render the templates of the pages, below the links to all of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from browser.core.page import (
    list_folder_sections,
    list_folder_tabs,
    list_links,
    list_models_parts,
    list_run_parts,
)
from modules.pages.page import render_page
from training.reports.page import TEMPLATE

BROWSER = Path(__file__).resolve().parent.parent
# a template is named by its path below one of these
FOLDERS = (BROWSER / "core", BROWSER / "folders", BROWSER / "pages", TEMPLATE.parent)
# a page may load only itself and its own data
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'"
)


def show_page(template: str, title: str, values: Mapping[str, Any], policy: str = POLICY) -> str:
    """Return the HTML of a template, such as `tags/tags.html` for one in `browser/pages/tags`."""
    shared_values = {
        "nav_links": list_links(),
        "folder_tabs": list_folder_tabs(),
        "folder_sections": list_folder_sections(),
        "run_parts": list_run_parts(),
        "models_parts": list_models_parts(),
    }
    return render_page(Path(template), title, {**shared_values, **values}, policy, FOLDERS)
