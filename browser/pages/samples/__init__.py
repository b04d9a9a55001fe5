"""Sample prompts of a described folder, as rows of fields."""

from starlette.routing import Route

from browser.core.page import Page, PagePart
from browser.core.server_state import Site
from browser.folders.draft_changes import folder_routes
from browser.pages.samples.samples import SamplePages


def _list_routes(site: Site) -> list[Route]:
    return folder_routes(site, "samples", SamplePages(site))


PAGE = Page(
    make_routes=_list_routes,
    folder_section=PagePart("samples/sample_part.html", position=1),
)
