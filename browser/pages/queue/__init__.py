"""The queue: its jobs, their buttons, and command lines that are added."""

from browser.core.page import NavLink, Page
from browser.pages.queue.queue_pages import queue_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=queue_routes,
    nav=NavLink("/queue", say("Queue"), position=3),
)
