"""What a training needs of the card, and the options that make it less."""

from starlette.routing import Route

from browser.core.page import Page, PagePart
from browser.core.server_state import Site
from browser.folders.draft_changes import folder_routes
from browser.pages.memory.memory_plan import MemoryPages


def _list_routes(site: Site) -> list[Route]:
    return folder_routes(site, "memory", MemoryPages(site))


PAGE = Page(
    make_routes=_list_routes,
    folder_section=PagePart("memory/memory_part.html", position=2),
)
