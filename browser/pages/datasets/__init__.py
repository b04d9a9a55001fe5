"""What a training makes of each dataset of runs: files, captions and buckets."""

from browser.core.page import NavLink, Page
from browser.pages.datasets.dataset_pages import dataset_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=dataset_routes,
    nav=NavLink("/datasets", say("Datasets"), position=6, is_seldom=True),
)
