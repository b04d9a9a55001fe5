"""All settings of a described folder: a table of options, and its three files as text."""

from starlette.routing import Route

from browser.core.page import Page, PagePart
from browser.core.server_state import Site
from browser.folders.draft_changes import folder_routes
from browser.pages.folder_settings.folder_settings import FolderSettingsPages


def _list_routes(site: Site) -> list[Route]:
    return folder_routes(site, "settings", FolderSettingsPages(site))


PAGE = Page(
    make_routes=_list_routes,
    folder_section=PagePart("folder_settings/settings_part.html", position=3),
)
