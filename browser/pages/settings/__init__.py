"""The options of the server, and the bin."""

from browser.core.page import NavLink, Page
from browser.pages.settings.settings_page import settings_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=settings_routes,
    nav=NavLink("/settings", say("Settings"), position=8, is_seldom=True),
)
