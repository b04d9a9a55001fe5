"""No page has a fault that axe-core, the checker of web accessibility, calls serious."""

import base64
import hashlib
import itertools
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.jobs import open_queue
from browser.options import BrowserOptions
from browser.runs import Runs
from browser.start import run_browser
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import open_page, wait_until
from tests.training.toy import train_toy, write_caches, write_prompts

AXE = "axe-core@4.14.1"  # by Deque Systems, MPL 2.0; half a megabyte, so it is fetched
INTEGRITY = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
SERIOUS = ("serious", "critical")
FAULTS = "axe.run().then(({violations}) => violations.map(({id, impact, nodes}) => "
FAULTS += "[impact, id, nodes.map(({html, failureSummary}) => [html.slice(0, 300), failureSummary])]))"
PROMPTS = "a cat --w 32 --h 32 --f 9 --d 11 --s 2\na dog --w 32 --h 32 --f 17 --d 12 --s 2\n"


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checker's program, from the registry of npm or from what it keeps."""
    folder, npm = tmp_path_factory.mktemp("axe"), shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which fetches axe-core, is not installed")
    done = subprocess.run([npm, "pack", AXE, "--prefer-offline"], cwd=folder, capture_output=True)
    packed = next(folder.glob("*.tgz"), None)
    if done.returncode != 0 or packed is None:
        pytest.skip(f"npm cannot fetch {AXE}")
    assert base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() == INTEGRITY
    with tarfile.open(packed) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that a page shows, runs in each state, and the exported page of the first."""
    folder = tmp_path_factory.mktemp("runs")
    write_caches(folder)
    words = ["--sample_prompts", write_prompts(folder, PROMPTS), "--sample_every_n_steps", 4, "--sample_now"]
    words += ["--save_every_n_steps", 4, "--validation_split", 0.2, "--validate_every_n_steps", 4]
    train_toy(folder, *words, has_page=True)
    for kind in (None, "", "bad"):
        write_run(folder / "others", f"run_{kind}", 4, kind)
    for name in ("one", "x" * 99):
        open_queue(Runs((folder,)), read_only=False).add(["convert_lora.py", "--input", name], folder)
    history = folder / "output" / "x-history.jsonl"
    run_browser(BrowserOptions(folders=(history,), export=folder / "shared.html"))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serve_runs(folder) as served:
        yield served


def each_look(page: Any) -> Iterator[tuple[int, str]]:
    """Show a page narrow and wide, dark and light."""
    for width, scheme in itertools.product((360, 1440), ("dark", "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        yield width, scheme


def list_faults(page: Any) -> list[Any]:
    """The serious faults of a page in each look."""
    return [
        (*look, *fault) for look in each_look(page) for fault in page.evaluate(FAULTS) if fault[0] in SERIOUS
    ]


def assert_fits(page: Any) -> None:
    """In each look a page is no wider than the screen and no text of it is small; all controls have names."""
    texts = "[...document.querySelectorAll('body *')].filter(one => one.innerText?.trim())"
    smallest = f"Math.min(...{texts}.map(one => parseFloat(getComputedStyle(one).fontSize)))"
    for width, _ in each_look(page):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(smallest) >= 12
    unnamed = (
        "[...document.querySelectorAll('input, select, button, video, img, textarea')].filter(one => "
        "one.type !== 'hidden' && !one.ariaHidden && !one.labels?.length "
        "&& !one.innerText && !(one.ariaLabel || one.alt))"
    )
    assert page.evaluate(f"{unnamed}.map(one => one.outerHTML)") == []


@pytest.mark.parametrize("name", ["/", "x", "/queue"])
def test_pages_fit_no_text_is_small_and_all_is_named(served: Served, name: str) -> None:
    with open_page(served.url + (name if name.startswith("/") else served.of(name))) as page:
        wait_until(page, "!document.getElementById('plots') || plots.length > 1")
        assert_fits(page)
        assert page.problems == []


@pytest.mark.parametrize("name", ["/", "/queue", "/compare", "/datasets", "x", "run_None", "run_bad"])
def test_no_page_has_a_serious_fault(axe: str, served: Served, name: str) -> None:
    with open_page(served.url + (name if name.startswith("/") else served.of(name))) as page:
        wait_until(page, "!document.getElementById('plots') || plots.length > 1")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.evaluate(axe)
        assert list_faults(page) == []
        assert page.locator("nav a").count() == 4
        if not name.startswith("/"):
            page.locator(".grid td a").first.click()
            page.wait_for_selector("#beside[open]")
            assert list_faults(page) == []


def test_an_exported_page_has_no_serious_fault_and_one_that_is_put_there_is_found(
    axe: str, folder: Path
) -> None:
    with open_page(folder / "shared.html") as page:
        page.evaluate(axe)
        assert list_faults(page) == []
        page.evaluate("document.querySelector('.note').style.color = '#999'")
        found = [(scheme, rule) for _, scheme, _, rule, _ in list_faults(page)]
        assert found == 2 * [("light", "color-contrast")]
