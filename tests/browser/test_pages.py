"""A page of the browser is a folder: no other file names it, and without it the others work as before."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.core.language_tables import CODES, PAGE_WORDS, SCRIPTS, read_table
from browser.core.page import FOLDER, list_pages
from browser.core.server_state import Site
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import open_queue
from browser.jobs.render_worker import RenderWorker
from browser.runs.runs import Runs
from modules.text_files import parse_json
from tests.browser.page_texts import SCRIPTS as SCRIPT_FILES
from tests.browser.page_texts import list_script_texts, list_texts
from tests.commands import ROOT
from tests.deleting import PAGES, check_page_deletion

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/__init__.py"))


def list_imported(path: Path) -> set[str]:
    """The modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_each_folder_is_a_page() -> None:
    folders = [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(list_pages()) == len(NAMES) == len(folders)
    positions = [page.nav.position for page in list_pages() if page.nav is not None]
    assert sorted(positions) == [*range(1, len(positions) + 1)]


def test_no_file_imports_a_page_but_those_of_its_folder() -> None:
    foreign = set()
    for path in [*(ROOT / "browser").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        own = f"browser.pages.{path.parent.name}"
        for module in list_imported(path):
            if module.startswith("browser.pages.") and not f"{module}.".startswith(f"{own}."):
                foreign.add(f"{path.relative_to(ROOT).as_posix()}: {module}")
    assert foreign == set()


def find_page(path: Path) -> str:
    """The page that has a file; "" for a file that pages share."""
    return path.relative_to(FOLDER).parts[0] if path.is_relative_to(FOLDER) else ""


@pytest.mark.parametrize("code", CODES[1:])
def test_words_of_a_single_page_are_in_its_folder(code: str) -> None:
    users: dict[str, set[str]] = {}
    for text, paths in list_texts().items():
        users.setdefault(text, set()).update(map(find_page, paths))
    for path in SCRIPT_FILES:
        for text in list_script_texts(path):
            users.setdefault(text, set()).add(find_page(path))
    for name in NAMES:
        path = FOLDER / name / f"words_{code}.json"
        words = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
        assert words.keys() <= {PAGE_WORDS, SCRIPTS}
        own = {text for text, pages in users.items() if pages == {name}}
        assert {text for section in words.values() for text in section} == own, name
    assert read_table(code)


@pytest.mark.parametrize(
    "name", [PAGES[-1], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[:-1])]
)
def test_a_page_is_deleted_with_its_folder(name: str, tmp_path: Path) -> None:
    assert check_page_deletion(name, tmp_path) == []


@pytest.mark.parametrize("name", PAGES)
def test_no_other_file_leads_to_a_page_that_can_be_deleted(name: str, tmp_path: Path) -> None:
    runs = Runs((tmp_path,))
    queue = open_queue(runs, read_only=False)
    site = Site(runs, queue, BackgroundJobs(queue), RenderWorker(queue))
    page = list_pages()[NAMES.index(name)]
    addresses = {route.path.partition("{")[0].rstrip("/") for route in page.make_routes(site)}
    assert addresses
    named = re.compile("|".join(rf"(?<![\w/]){re.escape(address)}(?![\w.-])" for address in addresses))
    files = [*(ROOT / "browser").rglob("*"), *(ROOT / "modules" / "pages").glob("*")]
    for path in [*files, *(ROOT / "training" / "reports").glob("*.html")]:
        if path.suffix in (".py", ".html", ".js") and find_page(path) != name:
            assert named.search(path.read_text(encoding="utf-8")) is None, path
