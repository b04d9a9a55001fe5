"""What a folder of `browser/pages` gives to the server, and how the server finds these folders."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from starlette.routing import Route

from browser.core.server_state import Site
from modules.installation import import_own
from modules.pages.language import TranslatableText

FOLDER = Path(__file__).resolve().parent.parent / "pages"


@dataclass(frozen=True)
class NavLink:
    """A link to a page, shown above every page."""

    address: str
    title: TranslatableText  # also the title of the page, by which its own link is marked
    position: int  # links are sorted by it
    is_seldom: bool = False  # on a phone, it is in a menu


@dataclass(frozen=True)
class FolderTab:
    """A tab below the images of a folder, on the pages New and Datasets; it is loaded when it is opened."""

    name: str  # its address is `/new/NAME`
    title: TranslatableText
    waiting_note: TranslatableText  # shown until it is loaded
    position: int  # tabs are sorted by it


@dataclass(frozen=True)
class PagePart:
    """A part that another folder brings to the page of a run, to Models, or to New for a described folder."""

    template: str  # below `browser/pages`: what is shown until the part is loaded
    position: int  # parts are sorted by it


Part = TypeVar("Part", NavLink, FolderTab, PagePart)


@dataclass(frozen=True)
class Page:
    """A page of the browser, or parts of other pages, with everything that the server knows of it."""

    make_routes: Callable[[Site], Sequence[Route]]
    nav: NavLink | None = None
    # largest bodies of requests in bytes, by address, if larger than those of other requests
    body_limits: Mapping[str, int] = field(default_factory=dict)
    public: str = ""  # beginning of the addresses that need no token; "" if all need it
    folder_tab: FolderTab | None = None
    folder_section: PagePart | None = None
    run_part: PagePart | None = None
    models_part: PagePart | None = None


@cache
def list_pages() -> tuple[Page, ...]:
    """Return the page of each folder in `browser/pages`."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    return tuple(import_own(f"browser.pages.{name}").PAGE for name in names)


@cache
def list_body_limits() -> Mapping[str, int]:
    """Return the largest bodies of requests in bytes, by address, of all pages that name them."""
    return {address: limit for page in list_pages() for address, limit in page.body_limits.items()}


@cache
def list_public_addresses() -> tuple[str, ...]:
    """Return the beginnings of the addresses that need no token."""
    return tuple(page.public for page in list_pages() if page.public)


def list_links() -> list[NavLink]:
    """Return the links to all pages in the order in which they are shown."""
    return _sort(page.nav for page in list_pages())


def list_folder_tabs() -> list[FolderTab]:
    """Return the tabs of a folder in the order in which they are shown."""
    return _sort(page.folder_tab for page in list_pages())


def list_folder_sections() -> list[PagePart]:
    """Return the sections of a described folder in the order in which they are shown."""
    return _sort(page.folder_section for page in list_pages())


def list_run_parts() -> list[PagePart]:
    """Return the parts that other folders add to the page of a run, in the order in which they are shown."""
    return _sort(page.run_part for page in list_pages())


def list_models_parts() -> list[PagePart]:
    """Return the parts that other folders add to the page Models, in the order in which they are shown."""
    return _sort(page.models_part for page in list_pages())


def _sort(parts: Iterable[Part | None]) -> list[Part]:
    """Return the parts of those folders that have one, sorted by position."""
    return sorted((part for part in parts if part is not None), key=lambda part: part.position)
