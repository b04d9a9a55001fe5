"""The pages with buttons, attacked: from other sites, with paths, markup, and files of strangers in a root.

The walks read the routes of the server and the fields of its templates, so that what is added is walked too.
"""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from html.parser import HTMLParser
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import psutil
import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Route

from browser.core.page_access import COOKIE
from browser.core.server import MAX_BYTES, Gate, make_app
from browser.core.server_state import Site
from browser.core.templates import BROWSER
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import open_queue
from browser.jobs.render_worker import RenderWorker
from browser.pages.generate.result_pages import ResultPages
from browser.pages.masks import mask_making
from browser.pages.queue.queue_pages import QueuePages
from browser.pages.runs.run_buttons import RunButtons
from browser.pages.tags import tag_pages
from browser.runs.runs import Runs
from project.new_options import NewOptions
from tests import warm_processes
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import is_of_browser
from tests.commands import ROOT
from tests.waiting import PATIENCE

SECRET = "what nobody may read"
HIDDEN = "nobody-may-list-this"  # in names of files outside
TOKEN = "a-secret-word-of-letters"
WRITES = ("hx-post", "hx-put", "hx-patch", "hx-delete")
# how a browser may ask for other pages than those of this server
STRANGERS: Sequence[dict[str, str]] = (
    {},
    {"Origin": "null"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": ""},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
)
FROM_HERE_BY_STRANGERS = ({"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"})


def save_image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 64, 3), shade, np.uint8)).save(path)


def describe(folder: Path, **options: Any) -> None:
    """Describe a folder of pictures as the command `new` does."""
    from project.files import write_project  # it loads torch, which servers of tests do without

    write_project(NewOptions(folder=folder, family="wan", task="t2v-1.3B", memory=24.0, **options))


def fill_outside(folder: Path) -> None:
    """Write what lies next to a root and is nobody's business: files of each kind that pages read."""
    save_image(folder / f"{HIDDEN}.png")
    for name in ("secret.txt", f"{HIDDEN}.txt", "dataset.toml", "prompts.txt"):
        (folder / name).write_text(SECRET, encoding="utf-8")
    (folder / "run.toml").write_text(f'[training]\noutput_name = "{SECRET}"\n', encoding="utf-8")
    (folder / "generated").mkdir()
    save_image(folder / "generated" / f"{HIDDEN}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two runs, a folder of pictures, a described one and a result; next to it lie secrets."""
    root = tmp_path / "root"
    write_run(root / "runs", "x", 10)
    write_run(root / "runs", "y", 4, None)
    for place in ("pictures", "described"):
        for number in range(3):
            save_image(root / place / f"{number}.png", 80 * number)
            (root / place / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    describe(root / "described")
    save_image(root / "generated" / "20261126-101010_7.png", 99)
    fill_outside(tmp_path / "outside")
    return root


def list_routes(served: Served, method: str) -> list[Route]:
    gate = make_app(served.runs, read_only=True)  # read only: it starts nothing
    assert isinstance(gate, Gate)
    assert isinstance(gate.app, Starlette)
    return [
        route for route in gate.app.routes if isinstance(route, Route) and method in (route.methods or ())
    ]


def fill_route(path: str, values: Mapping[str, str], otherwise: str) -> str:
    return re.sub(
        r"\{(\w+)(?::\w+)?\}",
        lambda match: values.get(match[1], "1" if ":int" in match[0] else otherwise),
        path,
    )


def read_templates() -> str:
    """All templates and scripts of the pages."""
    paths = [*BROWSER.rglob("*.html"), *BROWSER.rglob("*.js")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def list_words(route: Route) -> list[str]:
    """The words that a page puts where a route has `{what}`, such as `make` for /generate/{what}."""
    start, mark, end = route.path.partition("{what}")
    if not mark:
        return [""]
    shape = re.sub(r"\\\{\w+\\\}|\{\w+\}", "[^\"'`?]+?", re.escape(start))
    words = set(re.findall(rf"[\"'`](?:\$\{{ROOT\}})?{shape}([a-z_]+)", read_templates()))
    return sorted(words) or ["x"]


def list_addresses(served: Served, method: str) -> list[str]:
    """The address of each route, for things that are there and for things that are not."""
    run = served.of("x").split("/")[2]
    addresses = []
    for route in list_routes(served, method):
        for word, id in itertools.product(list_words(route), (run, "x")):
            addresses.append(fill_route(route.path, {"what": word, "id": id}, otherwise="x"))
    return list(dict.fromkeys(addresses))


def list_fields() -> list[str]:
    """The names of all fields of forms."""
    of_tools = [field.name for form in (tag_pages.FORM, mask_making.FORM) for field in form.fields]
    return sorted({*re.findall(r'\bname="([a-z_]+)"', read_templates()), *of_tools})


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file and folder below a folder, without the files of locks."""
    info = {}
    for path in folder.rglob("*"):
        if not path.name.endswith(".lock"):
            status = path.lstat()
            info[str(path)] = (0 if path.is_dir() else status.st_mtime_ns, status.st_size)
    return info


# --- other sites


def test_no_route_writes_for_a_page_of_another_site(root: Path) -> None:
    with serve_runs(root) as served:
        addresses = list_addresses(served, "POST")
        assert len(addresses) > 15
        before = list_files(root)
        for address in addresses:
            body = urlencode(dict.fromkeys(list_fields(), "x"))
            for headers in STRANGERS:
                answer = served.ask(address, "POST", body, **headers)
                assert answer.status == 403, (address, headers)
            for headers in FROM_HERE_BY_STRANGERS:
                answer = served.ask(address, "POST", body, Origin=served.url, **headers)
                assert answer.status == 403, (address, headers)
            for host in ("evil.example", f"127.0.0.1.evil.example:{served.port}"):
                answer = served.ask(address, "POST", body, Host=host, Origin=f"http://{host}")
                assert answer.status == 421, (address, host)
        assert list_files(root) == before


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_no_other_method_does_anything(root: Path, method: str) -> None:
    with serve_runs(root) as served:
        before = list_files(root)
        for address in list_addresses(served, "GET"):
            answer = served.ask(address, method, Origin=served.url)
            assert answer.status in (404, 405, 400, 422), (address, answer.status)
            assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert list_files(root) == before


def test_no_get_writes_or_starts_anything(root: Path) -> None:
    """A link on another site can make a browser ask for any address, with any query."""
    with serve_runs(root) as served:
        served.ask("/queue")
        before = list_files(root)
        children = list_children()
        query = urlencode(dict.fromkeys(list_fields(), "described") | {"folder": "described"})
        for address in list_addresses(served, "GET"):
            for text in ("", "?folder=described", "?folder=pictures", f"?{query}"):
                served.ask(f"{address}{text}", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")
        after = list_files(root)
        assert {path for path in after if path not in before or after[path] != before[path]} == set()
        assert list_children() <= children  # those of earlier tests may end meanwhile


# --- only looking


class Controls(HTMLParser):
    """What of a page could write, and what could run a script."""

    def __init__(self) -> None:
        super().__init__()
        self.writing: list[str] = []
        self.running: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        text = str(self.get_starttag_text())
        if any(name in values for name in WRITES) or values.get("method", "").lower() == "post":
            self.writing.append(text)
        if tag == "input" and values.get("type") == "file":
            self.writing.append(text)
        is_script = tag == "script" and not values.get("src", "").startswith(("/static/", "/language/"))
        addresses = [values.get(name, "") for name in ("href", "src", "action", "hx-get", "hx-post")]
        is_foreign = any(re.match(r"\s*(javascript:|vbscript:|data:text|//)", place) for place in addresses)
        handles = any(name.startswith(("on", "hx-on")) for name in values)
        handles |= any(values.get(name, "").startswith("js:") for name in ("hx-vals", "hx-headers"))
        if is_script or is_foreign or handles or tag in ("iframe", "object", "embed", "base", "svg:script"):
            self.running.append(text)


def read_controls(text: str) -> Controls:
    controls = Controls()
    controls.feed(text)
    return controls


QUERIES = ("", "?folder=described", "?folder=pictures")


def test_with_read_only_no_page_has_anything_that_writes_and_no_route_does(root: Path) -> None:
    with serve_runs(root, read_only=True) as served:
        before = list_files(root)
        for address in list_addresses(served, "POST"):
            body = urlencode(dict.fromkeys(list_fields(), "described"))
            assert served.ask(address, "POST", body, Origin=served.url).status == 403, address
        writing = {}
        for address, query in itertools.product(list_addresses(served, "GET"), QUERIES):
            answer = served.ask(f"{address}{query}")
            if answer.headers.get("content-type", "").startswith("text/html"):
                writing[f"{address}{query}"] = read_controls(answer.text).writing
        assert {address: texts for address, texts in writing.items() if texts} == {}
        assert list_files(root) == before


def test_without_the_token_no_route_answers(root: Path) -> None:
    with serve_runs(root, token=TOKEN) as served:
        before = list_files(root)
        for method, origin in (("GET", {}), ("POST", {"Origin": served.url})):
            for address in list_addresses(served, method):
                for cookie in ("", *(f"{COOKIE}={word}" for word in ("", TOKEN, "9999999999.x", "x"))):
                    answer = served.ask(address, method, "what=x" * 2, Cookie=cookie, **origin)
                    assert answer.status == 401, (method, address, cookie)
                    assert SECRET not in answer.text
        assert list_files(root) == before


# routes that take files, which have limits of their own; they write them to disk while they arrive
TAKES_FILES = {"/new/upload", "/new/piece", "/generate/file", "/generate/settings", "/masks/drawn"}


@pytest.mark.parametrize("headers", [{}, {"Transfer_Encoding": "chunked"}], ids=["whole", "chunked"])
def test_bodies_are_limited_and_damaged_ones_are_refused(root: Path, headers: dict[str, str]) -> None:
    with serve_runs(root) as served:
        for address in list_addresses(served, "POST"):
            if address in TAKES_FILES:
                continue
            large = "folder=" + "x" * MAX_BYTES
            answer = served.ask(address, "POST", large, Origin=served.url, **headers)
            assert answer.status == 413, address
            for body in ("\0\1\2", "{" * 1000, "[" * 100_000, "%ff%00=%zz", "&" * 10_000, "folder"):
                answer = served.ask(address, "POST", body, Origin=served.url, **headers)
                assert answer.status < 500, (address, body[:9])
                assert "Traceback" not in answer.text


# --- paths

LONG = "x" * 900  # longer than names may be
MAX_OF_ADDRESS = 60_000  # characters; the server of HTTP takes no longer ones


def list_few_ways_out(outside: Path) -> list[str]:
    """Texts that name something outside, or nothing that can be."""
    return [f"../{outside.name}", str(outside), "--overwrite", f"linked/{HIDDEN}.png"]


def list_main_ways_out(outside: Path) -> list[str]:
    """The same, one of each kind."""
    return [
        *list_few_ways_out(outside),
        "..",
        f"{outside}/run.toml",
        "/dev/zero",
        "C:\\Windows",
        "a\0b",
        "\ud800",
        LONG,
        "$(id)",
        "linked",
    ]


def list_ways_out(outside: Path) -> list[str]:
    """The same in the ways of several systems."""
    name = outside.name
    return [
        *list_main_ways_out(outside),
        f"described/../../{name}",
        "/proc/self/environ",
        "~",
        f"..%2f{name}",
        f"..\\{name}",
        "\n",
        "generated/linked.png",
        f"../{name}/",
        f"./../{name}/.",
        f"..//{name}",
        f"//{outside}",
        f"file://{outside}",
        "/",
        "//",
        "/etc",
        "/etc/passwd",
        "/dev/stdin",
        "~root",
        "~nobodyofthisname",
        "~/..",
        "$HOME",
        "%HOME%",
        quote(str(outside), safe=""),
        "..\\..\\",
        "C:",
        "C:/Windows",
        "\\\\server\\share",
        "//server/share",
        "\\\\?\\C:\\",
        "CON",
        "NUL.txt",
        "con/aux",
        "COM1:",
        "a:b",
        f"described\0/../../{name}",
        f"{LONG}/x",
        "/".join(["x"] * 3000),
        "\u202e",
        "\r\n",
        "-rf",
        "--save_path=/",
        "; id",
        "`id`",
        "| id",
        "&& id",
        "linked_file.png",
        "linked/../../secret.txt",
        "described/linked",
    ]


ListTexts = Callable[[Path], list[str]]


def link_out(root: Path, outside: Path) -> None:
    """Put links to what lies outside into a root."""
    (root / "linked").symlink_to(outside)
    (root / "linked_file.png").symlink_to(outside / f"{HIDDEN}.png")
    (root / "described" / "linked").symlink_to(outside)
    (root / "generated" / "linked.png").symlink_to(outside / f"{HIDDEN}.png")
    (root / "circle").symlink_to(root / "circle")


def encode(fields: Mapping[str, str]) -> str:
    return urlencode(fields, errors="surrogatepass")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize(
    ("base", "list_texts"),
    [
        pytest.param("", list_main_ways_out, id="no folder"),
        pytest.param("described", list_few_ways_out, id="a right folder"),  # commands are begun for each text
        pytest.param("", list_ways_out, id="no folder, all", marks=pytest.mark.slow),
        pytest.param("described", list_ways_out, id="a right folder, all", marks=pytest.mark.slow),
    ],
)
def test_no_field_of_any_form_leads_outside(
    root: Path, tmp_path: Path, base: str, list_texts: ListTexts
) -> None:
    """Each text in each field alone, and in all fields at once, with and without a right folder."""
    outside = tmp_path / "outside"
    link_out(root, outside)
    fields = list_fields()
    assert {"folder", "name", "id", "source", "prompt"} <= set(fields)
    with serve_runs(root) as served:
        before = list_files(outside)
        for text in list_texts(outside):
            all_fields = dict.fromkeys(fields, text) | ({"folder": base} if base else {})
            # of a right folder all fields are hostile at once: commands must not be begun a thousand times
            query = encode(all_fields)
            for address in list_addresses(served, "GET") if len(query) < MAX_OF_ADDRESS else ():
                check_answer(served, f"{address}?{query}", "GET", text)
            for address in list_addresses(served, "POST"):
                check_answer(served, address, "POST", text, encode(all_fields))
        wait_for_children()
        assert list_files(outside) == before
        assert not list((tmp_path / "root").rglob(f"{HIDDEN}*"))


def check_answer(served: Served, address: str, method: str, text: str, body: str = "") -> None:
    origin = {"Origin": served.url} if method == "POST" else {}
    answer = served.ask(address, method, body, **origin)
    assert answer.status < 500, (method, address[:200], text[:80], answer.text[:200])
    shown = answer.text
    for slash in ("/", "%2F", "%252F"):  # the text itself, said to be wrong, or kept in links
        shown = shown.replace(f"linked{slash}{HIDDEN}.png", "")
    assert SECRET not in shown, (method, address[:200], text[:80])
    assert HIDDEN not in shown, (method, address[:200], text[:80])
    assert "root:x:" not in shown


def list_children() -> set[psutil.Process]:
    """The processes that this one and its servers have started, and that have not ended.

    The processes that run scripts for all tests are left out, the browser, which files of tests share, and
    those that Python keeps for what earlier tests started with multiprocessing.
    """
    warm = {server.pid for server in warm_processes.SERVERS}
    warm.add(getattr(forkserver, "_forkserver")._forkserver_pid)  # noqa: B009
    warm.add(getattr(resource_tracker, "_resource_tracker")._pid)  # noqa: B009
    alive = set()
    started = psutil.Process().children(recursive=True)
    warm |= {process.pid for process in started if is_of_browser(process)}
    for child in started:
        with contextlib.suppress(psutil.Error):  # it has just ended
            if child.pid not in warm and child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child)
    return alive


def wait_for_children(*others: psutil.Process, seconds: float = PATIENCE) -> None:
    """Wait until all commands that were started have ended; some say what is wrong with their options."""
    end = time.monotonic() + seconds
    while list_children() - {*others}:
        assert time.monotonic() < end, [child.cmdline() for child in list_children()]
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize(
    "list_texts",
    [
        pytest.param(list_main_ways_out, id="one of each kind"),
        pytest.param(list_ways_out, id="all", marks=pytest.mark.slow),
    ],
)
def test_no_address_leads_outside(root: Path, tmp_path: Path, list_texts: ListTexts) -> None:
    outside = tmp_path / "outside"
    link_out(root, outside)
    with serve_runs(root) as served:
        run = served.of("x").split("/")[2]
        for route in list_routes(served, "GET"):
            if "{" not in route.path:
                continue
            for text in list_texts(outside):
                for spelled in (
                    quote(text, safe="", errors="surrogatepass"),
                    quote(text.encode("utf-8", "replace")),
                ):
                    address = fill_route(route.path, {"id": run}, otherwise=spelled)
                    if len(address) > 8000:
                        continue
                    check_answer(served, address, "GET", text)


FILES_OF_A_DRAFT = ("run.toml", "dataset.toml", "prompts.txt")


def link_file_out(root: Path, outside: Path, name: str) -> None:
    """Put a link to a file outside in the place of a file of the described folder."""
    path = root / "described" / name
    (outside / f"draft-{name}").write_bytes(path.read_bytes() + f"# {SECRET}\n".encode())
    path.unlink()
    path.symlink_to(outside / f"draft-{name}")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", FILES_OF_A_DRAFT)
def test_files_of_a_draft_that_lead_outside_are_not_shown(root: Path, tmp_path: Path, name: str) -> None:
    link_file_out(root, tmp_path / "outside", name)
    with serve_runs(root) as served:
        for address in list_addresses(served, "GET"):
            check_answer(served, f"{address}?folder=described", "GET", name)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.slow_cases("dataset.toml", "prompts.txt")
@pytest.mark.parametrize("name", FILES_OF_A_DRAFT)
def test_files_of_a_draft_that_lead_outside_are_not_written(root: Path, tmp_path: Path, name: str) -> None:
    link_file_out(root, tmp_path / "outside", name)
    before = list_files(tmp_path / "outside")
    fields = {"folder": "described", "name": "own", "steps": "7", "text": "x", "family": "wan"}
    fields |= {"task": "t2v-1.3B"}
    with serve_runs(root) as served:
        for address in list_addresses(served, "POST"):
            check_answer(served, address, "POST", name, urlencode(fields))
        wait_for_children()
    assert list_files(tmp_path / "outside") == before


# --- what the documentation says of each address

ROW = re.compile(r"^\| `(GET|POST) (\S+)`(?:: ([^|]*))? \|", re.MULTILINE)


def read_page() -> str:
    return (ROOT / "tests" / "browser" / "addresses.md").read_text(encoding="utf-8")


def read_rows(text: str) -> dict[str, set[str]]:
    """Return the buttons of each address that has a row."""
    return {
        f"{method} {path}": set(re.findall(r"`(\w+)`", words)) for method, path, words in ROW.findall(text)
    }


def test_the_documentation_says_of_each_address_what_it_may_do(root: Path) -> None:
    """A new address, or a new button of one, needs its row."""
    text = read_page()
    rows = read_rows(text)
    with serve_runs(root) as served:
        routes = {
            f"{method} {route.path}": set(list_words(route))
            for method in ("GET", "POST")
            for route in list_routes(served, method)
        }
    assert rows.keys() == routes.keys()
    for address, words in routes.items():
        if address.startswith("POST") and "{what}" in address:
            method, _, path = address.partition(" ")
            others = {word for word in words if f"{path.replace('{what}', word)}" in str(routes.keys())}
            assert words - others <= rows[address], address
    for line in filter(ROW.match, text.splitlines()):
        cells = line.split("|")[2:-1]
        assert len(cells) == (2 if "`GET " in line else 4), line  # those that write or start have a sentence
        assert all(cell.strip() for cell in cells), line


BUTTONS: dict[str, Callable[[Site], Collection[str]]] = {  # of pages that look a word up
    "POST /results/{id}/{what}": lambda site: ResultPages(site).changes,
    "POST /run/{id}/do/{what}": lambda site: {**RunButtons(site).actions, "remove": None},
    "POST /queue/{what}": lambda site: QueuePages(site.runs, site.queue, site.tracked_runs).changes,
}


@pytest.mark.parametrize("address", BUTTONS)
def test_the_documentation_has_each_button_that_a_page_looks_up(address: str, root: Path) -> None:
    rows = read_rows(read_page())
    runs = Runs((root,))
    queue = open_queue(runs, read_only=True)
    site = Site(runs, queue, BackgroundJobs(queue), RenderWorker(queue))
    assert set(BUTTONS[address](site)) <= rows[address]
