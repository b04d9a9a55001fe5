"""Items of a run, on its page: how often each is drawn, and buttons that ask the running training."""

from browser.core.page import Page, PagePart
from browser.pages.items.item_pages import item_routes

PAGE = Page(
    make_routes=item_routes,
    run_part=PagePart("items/run_part.html", position=1),
)
