"""Tags of a folder: written by a model, and edited together."""

from browser.core.page import FolderTab, Page
from browser.pages.tags.tag_pages import tag_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=tag_routes,
    folder_tab=FolderTab("tags", say("Tags"), waiting_note=say("The captions are being read."), position=1),
)
