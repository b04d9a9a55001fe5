"""The line above all pages: what runs on this machine, its cards and its disk."""

from browser.core.page import Page
from browser.pages.machine.machine_status import machine_routes

PAGE = Page(
    make_routes=machine_routes,
)
