"""Saved files and prompts side by side."""

from browser.core.page import NavLink, Page
from browser.pages.compare.compare_pages import compare_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=compare_routes,
    nav=NavLink("/compare", say("Compare"), position=5, is_seldom=True),
)
