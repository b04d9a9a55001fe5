"""New: from a folder of media to a training, step by step."""

from browser.core.page import NavLink, Page
from browser.pages.new import upload_parts, uploads
from browser.pages.new.new_pages import new_routes
from modules.pages.language import say

PAGE = Page(
    make_routes=new_routes,
    nav=NavLink("/new", say("New"), position=1),
    body_limits={
        uploads.ADDRESS: uploads.DEFAULT_LIMITS.file_bytes,
        upload_parts.ADDRESS: upload_parts.PIECE_BYTES,
    },
)
