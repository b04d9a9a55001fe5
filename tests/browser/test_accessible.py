"""No page has a fault that axe-core, the checker of web accessibility, calls serious."""

import base64
import hashlib
import itertools
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.core.options import BrowserOptions
from browser.core.serving import run_browser
from browser.jobs.jobs import open_queue
from browser.runs.runs import Runs
from generation.sheets import ClipGrid, Row, write_grids
from modules.pages.charts import Chart, Curve, draw_chart
from modules.pages.page import write_page
from pocket import report as quickstart
from tests.browser.described_folders import describe
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import open_page, wait_until
from tests.data_tools.report.making import report, save_clip
from tests.data_tools.report.test_page import make_config, make_set
from tests.data_tools.report.test_page import write_page as write_check
from tests.run_pages import find_run_page
from tests.training.toy import train_toy, write_caches, write_prompts

AXE = "axe-core@4.14.1"  # by Deque Systems, MPL 2.0; half a megabyte, so it is fetched
INTEGRITY = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
SERIOUS = ("serious", "critical")
WIDTHS = (360, 390, 768, 1024, 1280, 1920, 2560)
FILES = ("run", "check", "report", "sheet", "quickstart")  # pages that need no server
FAULTS = "axe.run().then(({violations}) => violations.map(({id, impact, nodes}) => "
FAULTS += "[impact, id, nodes.map(({html, failureSummary}) => [html.slice(0, 300), failureSummary])]))"
# what a finger has to meet, and does not: too low, beyond the screen, or under something else
MISSED = """[...document.querySelectorAll('button, summary, select, nav a')]
  .filter(one => one.checkVisibility()).filter(one => {
    one.scrollIntoView({block: 'center'});
    const {x, y, width, height} = one.getBoundingClientRect();
    const there = document.elementFromPoint(x + width / 2, y + height / 2);
    return height < 24 || x < 0 || x + width > innerWidth || !(there && one.contains(there));
  }).map(one => one.outerHTML)"""
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
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of each kind that a program of ours writes into a file."""
    made = tmp_path_factory.mktemp("files")
    report(make_set(made), "--output", str(made / "report.html"))
    clips = [save_clip(made / f"{name}.mp4", 8, 9) for name in ("a", "b", "c")]
    rows = [
        Row("a cat", 16.0, (*clips,), "seed 7", strength, ("", "--prompt x", "--prompt y"))
        for strength in ("0.6", "1")
    ]
    write_grids(made, "sheet", ClipGrid(("without LoRA", "style-000100", "style-000200"), (*rows,)), "style")
    table = quickstart.in_a_row((f"a {clip.stem} moving left", clip, "20 dB") for clip in clips)
    chart = draw_chart(Chart([Curve("loss", [0, 1], [2, 1])], "step", "loss", "Loss"))
    taught = {"word": "blorp", "clips": table, "losses": [4, 3, 2, 1], "charts": [chart], "prompt": "a blorp"}
    counts = {"word": "blorp", "colour": "zindle", "asked": 4, "counts": (0, 4), "steps": 9}
    tables = dict.fromkeys(("before_and_after", "second", "both", "footage"), table)
    values = {**counts, **tables, "trainings": [{**taught, "samples": table}], "commands": ["python x.py"]}
    write_page(made / "quickstart.html", quickstart.TEMPLATE, quickstart.TITLE, values)
    found = {name: made / f"{name}.html" for name in FILES}
    (made / "clips2").mkdir()
    clip = save_clip(made / "clips2/a.mp4", 9, 9, caption="a cat on a mat, and much more that is not read")
    found["check"] = write_check(made, make_config(clip.parent, resolution=(32, 32)))
    return {**found, "run": find_run_page(folder / "output")}


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


def list_errors(page: Any) -> list[Any]:
    """The serious faults of a page in each look."""
    return [
        (*look, *error) for look in each_look(page) for error in page.evaluate(FAULTS) if error[0] in SERIOUS
    ]


def assert_fits(page: Any) -> None:
    """A page is no wider than any screen and no text of it is small; all controls can be tapped and have
    names.
    """
    texts = "[...document.querySelectorAll('body *')].filter(one => one.innerText?.trim())"
    smallest = f"Math.min(...{texts}.map(one => parseFloat(getComputedStyle(one).fontSize)))"
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(smallest) >= 12
    page.set_viewport_size({"width": WIDTHS[0], "height": 740})
    assert page.evaluate(MISSED) == []
    unnamed = (
        "[...document.querySelectorAll('input, select, button, video, img, textarea')].filter(one => "
        "one.type !== 'hidden' && !one.ariaHidden && !one.labels?.length "
        "&& !one.textContent.trim() && !(one.ariaLabel || one.alt))"
    )
    assert page.evaluate(f"{unnamed}.map(one => one.outerHTML)") == []


@pytest.mark.slow_cases("/", "/queue", "/models", "/settings", "x")
@pytest.mark.parametrize("name", ["/", "x", "/queue", "/models", "/settings"])
def test_pages_fit_no_text_is_small_and_all_is_named(served: Served, name: str) -> None:
    with open_page(served.url + (name if name.startswith("/") else served.of(name))) as page:
        wait_until(page, "!document.getElementById('plots') || plots.length > 1")
        assert_fits(page)
        assert page.problems == []


@pytest.mark.slow_cases("check", "quickstart", "report", "run", "sheet")
@pytest.mark.parametrize("name", FILES)
def test_pages_of_one_file_fit_and_have_no_serious_fault(axe: str, files: dict[str, Path], name: str) -> None:
    with open_page(files[name]) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert_fits(page)
        page.evaluate(axe)
        assert list_errors(page) == []
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(248, 245, 238)"
        )  # paper
        assert page.problems == []


@pytest.mark.slow_cases("/", "/compare", "/datasets", "/models", "/settings", "run_bad", "x")
@pytest.mark.parametrize(
    "name", ["/", "/queue", "/compare", "/datasets", "/models", "/settings", "x", "run_None", "run_bad"]
)
def test_no_page_has_a_serious_fault(axe: str, served: Served, name: str) -> None:
    with open_page(served.url + (name if name.startswith("/") else served.of(name))) as page:
        wait_until(page, "!document.getElementById('plots') || plots.length > 1")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.evaluate(axe)
        assert list_errors(page) == []
        assert page.locator("nav > a:visible, nav .wide-only:not(.languages) a:visible").count() == 8
        if not name.startswith("/"):
            page.locator(".grid td a").first.click()
            page.wait_for_selector("#beside[open]")
            assert list_errors(page) == []


def test_a_draft_and_what_its_buttons_open_have_no_serious_fault(axe: str, tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips", is_trusted=False, log_with="wandb")
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text.replace(str(tmp_path), "/no/such/place"), encoding="utf-8")
    with serve_runs(tmp_path) as served:
        (address,) = re.findall(r'href="(/run/\w+/)"', served.ask("/").text)
        with open_page(f"{served.url}{address}") as page:
            page.get_by_role("button", name="I have read it").wait_for()
            page.evaluate(axe)
            assert list_errors(page) == []
            for button, shown in (("Edit samples", "Save the samples"), ("Remove", "Move it into the bin")):
                page.get_by_role("button", name=button).click()
                page.get_by_role("button", name=shown).wait_for()
                assert list_errors(page) == []
            assert_fits(page)
            assert page.problems == []


@pytest.mark.slow
def test_an_exported_page_has_no_serious_fault_and_one_that_is_put_there_is_found(
    axe: str, folder: Path
) -> None:
    with open_page(folder / "shared.html") as page:
        page.evaluate(axe)
        assert list_errors(page) == []
        page.evaluate("document.querySelector('.note').style.color = '#999'")
        found = [(scheme, rule) for _, scheme, _, rule, _ in list_errors(page)]
        assert found == 2 * [("light", "color-contrast")]
