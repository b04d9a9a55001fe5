"""Regularization images of a described folder, made by its base model."""

from browser.core.page import FolderTab, Page
from browser.pages.regularization.regularization_pages import regularization_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=regularization_routes,
    folder_tab=FolderTab(
        "regularization",
        say("Regularization images"),
        waiting_note=say("The form is being loaded."),
        position=3,
    ),
)
