"""The list of runs, and each run: its page, its buttons, and links for others."""

from browser.core.page import NavLink, Page
from browser.pages.runs.run_pages import run_routes
from browser.pages.runs.shares import ADDRESS
from modules.pages.language import say

PAGE = Page(
    make_routes=run_routes,
    nav=NavLink("/", say("Runs"), position=2),
    public=ADDRESS,
)
