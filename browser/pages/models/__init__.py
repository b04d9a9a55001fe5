"""Released models: what of them is on disk, downloads and removals."""

from browser.core.page import NavLink, Page
from browser.pages.models.model_pages import model_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=model_routes,
    nav=NavLink("/models", say("Models"), position=7, is_seldom=True),
)
