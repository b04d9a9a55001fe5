"""Generate: the form, the renderings on their way, and the results of all days."""

from starlette.routing import Route

from browser.core.page import NavLink, Page
from browser.core.server_state import Site
from browser.pages.generate.dropped_files import MAX_BYTES
from browser.pages.generate.generate_pages import generate_routes
from browser.pages.generate.result_pages import result_routes
from modules.pages.language import say


def _list_routes(site: Site) -> list[Route]:
    return [*result_routes(site), *generate_routes(site)]


PAGE = Page(
    make_routes=_list_routes,
    nav=NavLink("/generate", say("Generate"), position=4),
    body_limits={"/generate/file": MAX_BYTES, "/generate/settings": MAX_BYTES},
)
