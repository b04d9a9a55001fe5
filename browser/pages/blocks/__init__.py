"""Blocks of a LoRA: what is wrong with it, what each block does, other strengths, and a file with them."""

from browser.core.page import Page, PagePart
from browser.pages.blocks.block_pages import block_routes

PAGE = Page(
    make_routes=block_routes,
    run_part=PagePart("blocks/run_part.html", position=2),
    models_part=PagePart("blocks/models_part.html", position=1),
)
