"""Masks of a folder: made by a model, looked through and drawn."""

from starlette.routing import Route

from browser.core.page import FolderTab, Page
from browser.core.server_state import Site
from browser.pages.masks.mask_making import mask_making_routes
from browser.pages.masks.mask_pages import DRAWN_ADDRESS, MAX_DRAWN_MASK_BYTES, mask_routes
from modules.pages.language import say


def _list_routes(site: Site) -> list[Route]:
    return [*mask_making_routes(site), *mask_routes(site)]


PAGE = Page(
    make_routes=_list_routes,
    body_limits={DRAWN_ADDRESS: MAX_DRAWN_MASK_BYTES},
    folder_tab=FolderTab("masks", say("Masks"), waiting_note=say("The folder is being read."), position=2),
)
