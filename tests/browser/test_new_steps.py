"""The one button of the page New: its word by state, always in view, and the way to a running training."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

import torch
from safetensors.torch import load_file, save_file

from browser.folders.described_folder import FILES
from browser.folders.new_form import NewForm
from browser.jobs.jobs import QUEUE, STATE, open_queue
from browser.pages.new.new_steps import FolderProgress, select_step
from browser.runs.runs import DIED, FINISHED, RUNNING, Runs
from project.options import find_models
from tests.browser.described_folders import describe as describe_folder
from tests.browser.serving import Served, serve_runs
from tests.browser.test_new_page import PARTS, text_of, write_images
from tests.browser.test_new_page import post as press_button
from tests.chromium import open_page, wait_until
from tests.tiny.wan_encoders import write_tokenizer
from tests.waiting import MILLISECONDS, PATIENCE

SCREENS = ((1440, 900), (390, 844))
MAX_SCREENS = 3
FILLED = NewForm(folder="set", family="wan", task="t2v-1.3B")
DESCRIBED = {"is_described": True}
CHECKED = {**DESCRIBED, "check_job": (FINISHED, 0)}
SECONDS = 1000  # milliseconds
MAX_CLICKS = 6


def job(state: str, code: int | None = None) -> Any:
    return SimpleNamespace(state=state, code=code, progress_words=", 11.2 of 34.8 GB")


def standing(**facts: Any) -> FolderProgress:
    """How far a folder is. A pair stands for a job: its state and exit code."""
    return FolderProgress(
        **{name: job(*fact) if isinstance(fact, tuple) else fact for name, fact in facts.items()}
    )


@pytest.mark.parametrize(
    ("facts", "is_written", "word"),
    [
        ({}, False, "Prepare"),
        ({"description_job": (RUNNING,)}, False, "Preparing …"),
        (
            {**DESCRIBED, "description_job": (FINISHED, 0), "has_changes": True},
            False,
            "Replace the three files",
        ),
        ({**CHECKED}, False, "Prepare"),  # something was typed since
        ({**DESCRIBED, "missing_gigabytes": "99 GB"}, True, "Download the model (99 GB)"),
        ({**CHECKED, "missing_gigabytes": "99 GB"}, True, "Download the model (99 GB)"),
        (
            {**DESCRIBED, "missing_gigabytes": "99 GB", "download": (RUNNING,)},
            True,
            "Downloading the model, 11.2 of 34.8 GB …",
        ),
        ({**DESCRIBED, "downloads_at_start": True}, True, "Start"),
        ({**DESCRIBED, "uncaptioned": 2, "missing_gigabytes": "40 GB"}, True, "Write captions"),
        ({**DESCRIBED, "has_listed_errors": True, "missing_gigabytes": "40 GB"}, True, "Look at the files"),
        (DESCRIBED, True, "Check"),
        ({**DESCRIBED, "check_job": (RUNNING,)}, True, "Checking …"),
        ({**DESCRIBED, "check_job": (DIED, 1)}, True, "Check"),
        ({**CHECKED, "is_check_old": True}, True, "Check"),
        (CHECKED, True, "Start"),
        ({**CHECKED, "training_job": ("waiting",)}, True, "Show the training"),
        ({**CHECKED, "training_job": (RUNNING,), "run_address": "/run/0/"}, True, "Show the training"),
        ({**CHECKED, "training_job": (DIED, 1), "run_address": "/run/0/"}, True, "Start"),
    ],
)
def test_the_word_of_the_button_follows_the_state(facts: dict[str, Any], is_written: bool, word: str) -> None:
    step = select_step(FILLED, standing(**facts), is_written)
    assert step.label == word
    other = select_step(NewForm(folder="set"), standing(**facts), is_written)
    assert (other.label, other.missing) == ("Prepare", ["a model"])


def test_what_has_worked_and_what_is_to_be_mended_is_said() -> None:
    assert select_step(FILLED, standing(**CHECKED), True).done == "Prepared, checked: no fault."
    loaded = standing(**DESCRIBED, download=(FINISHED, 0))
    assert select_step(FILLED, loaded, True).done == "Prepared, the model is here."
    faulty = select_step(FILLED, standing(**DESCRIBED, check_job=(DIED, 1)), True)
    assert faulty.missing == ["what the check has found"]
    bare = select_step(FILLED, standing(**DESCRIBED, uncaptioned=12), True)
    assert bare.missing == ["captions of 12 images, or a trigger word"]
    assert (bare.address, bare.second_label, bare.second_address) == (
        "#writer",
        "Type a trigger word",
        "#trigger",
    )
    assert standing(**DESCRIBED).change_key != standing(**CHECKED).change_key


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("roots")
    for number in range(9):
        write_images(root / f"more {number}", 1)
    describe_folder(root / "set")
    describe_folder(root / "loaded", dit=str(root / "models" / "wan.safetensors"))
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root, models=root.parent / "models") as served:
        yield served


def is_in_view(page: Any) -> bool:
    box = page.locator("#step").bounding_box()
    size = page.viewport_size
    ends = (box["x"] + box["width"], box["y"] + box["height"])
    return min(box["x"], box["y"]) >= 0 and ends[0] <= size["width"] and ends[1] <= size["height"]


def test_the_button_is_always_in_view_and_the_page_is_low(served: Served, root: Path) -> None:
    described = f"/new?{urlencode({'folder': str(root / 'set')})}"
    with open_page(served.url) as page:
        for address in ("/new", described):
            page.goto(served.url + address)
            if address != "/new":
                page.locator("#text-prompts").wait_for(state="attached")
            for width, height in SCREENS:
                page.set_viewport_size({"width": width, "height": height})
                for place in ("0", "document.documentElement.scrollHeight"):
                    page.evaluate(f"scrollTo(0, {place})")
                    assert is_in_view(page), (address, width, place)
                if width == SCREENS[0][0]:
                    shown = page.evaluate("document.documentElement.scrollHeight")
                    assert shown <= MAX_SCREENS * height, address
        assert page.get_by_role("button", name="Check", exact=True).count() == 1
        assert page.locator("#next").get_by_text("Prepared.").is_visible()
        page.set_viewport_size({"width": 1440, "height": 900})
        page.get_by_label("Training steps", exact=True).fill("77")
        page.get_by_role("button", name="Prepare", exact=True).wait_for()
        assert "77 steps" in page.locator("#next").inner_text()
        assert page.evaluate("document.activeElement.id") == "steps"
        page.get_by_text("show the command").click()
        assert page.locator("#command").inner_text() == "run.toml: max_train_steps = 77"
        assert page.problems == []


def test_the_bar_is_grey_until_it_knows_and_a_press_does_nothing_old(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/new?{urlencode({'folder': str(root / 'set')})}") as page:
        posted: list[str] = []
        held: list[Any] = []
        page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
        page.get_by_role("button", name="Check", exact=True).wait_for()
        page.route("**/new?*steps=78*", lambda route: held.append(route))
        page.get_by_label("Training steps", exact=True).fill("78")
        assert page.locator("#step[aria-disabled=true]").inner_text() == "Check"
        page.locator("#step").evaluate("one => one.click()")
        with page.expect_request("**/new?*steps=78*"):
            pass
        assert page.locator("#step[aria-disabled=true]").count() == 1
        for route in held:
            route.continue_()
        page.unroute("**/new?*steps=78*")
        page.locator("#step:not([aria-disabled])").get_by_text("Prepare", exact=True).wait_for()
        # another step now, which was not pressed
        assert not any(url.endswith(("/new/check", "/new/describe")) for url in posted)
        assert page.problems == []


def test_lists_that_scroll_say_how_many_more(served: Served) -> None:
    with open_page(f"{served.url}/new", width=390, height=844) as page:
        note = page.locator(".folders + .below")
        first = int(re.findall(r"\d+", note.inner_text())[0])
        assert 0 < first < 11
        page.locator(".folders").evaluate("one => { one.scrollTop = 150; }")
        wait_until(page, f"!document.querySelector('.folders + .below').textContent.includes('{first} ')")
        page.locator(".folders").evaluate("one => { one.scrollTop = one.scrollHeight; }")
        wait_until(page, "document.querySelector('.folders + .below').textContent === ''")


def test_the_page_reads_without_scripts(served: Served, root: Path) -> None:
    text = served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    for words in (">Check</button>", "Prepared.", "10 steps", "its model is here", " free</span>"):
        assert words in text
    assert text.count('id="step"') == 1


def test_the_model_is_loaded_after_its_licences_and_only_what_is_missing(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "loaded" / "run.toml").read_text(encoding="utf-8")
    models = root.parent / "models"
    (model,) = [one for one in find_models() if (one.family, one.task) == ("wan", "t2v-1.3B")]
    parts = {part.option: str(models / part.path) for part in model.components if part.option}
    files = [parts["--dit"], str(root / "set" / "cat.png"), str(root / "set" / "cat.png")]
    (root / "loaded" / "run.toml").write_text(
        text.replace('files = ["cache/dit.safetensors"]', f"files = {json.dumps(files)}"), encoding="utf-8"
    )
    page = served.ask(f"/new?folder={quote(str(root / 'loaded'))}").text
    assert re.search(r">Download the model \([\d.]+ GB\)</button>", page)
    assert "I accept this license" in page
    started: list[list[str]] = []
    monkeypatch.setattr(
        "browser.jobs.background_jobs.BackgroundJobs.start",
        lambda _, name, words, folder: started.append(words),
    )
    refused = press_button(served, "load", folder=str(root / "loaded"))
    assert (refused.status, started) == (422, [])
    assert "accept them" in text_of(refused, "refused")
    assert press_button(served, "load", folder=str(root / "loaded"), accept="yes").status == 200
    [words] = started
    assert words[:6] == ["reelsmith", "download", "--family", "wan", "--task", "t2v-1.3B"]
    assert words[-3:] == ["--without", "t5", "vae"]
    assert press_button(served, "load", folder=str(root / "set"), accept="yes").status == 422


def test_the_check_begins_by_itself_on_a_slow_machine(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is complete before htmx, which begins by a timer, knows the forms."""
    started: list[list[str]] = []
    monkeypatch.setattr(
        "browser.jobs.background_jobs.BackgroundJobs.start",
        lambda _, name, words, folder: started.append(words),
    )
    folder = str(root / "set")
    with open_page(served.url) as page:
        page.evaluate("folder => sessionStorage.setItem('going on in', folder)", folder)
        page.add_init_script("{ const start = setTimeout; setTimeout = (f, ms = 0) => start(f, ms + 400); }")
        with page.expect_response("**/new/check", timeout=20 * SECONDS):
            page.goto(f"{served.url}/new?{urlencode({'folder': folder})}")
    assert [words[:2] for words in started] == [["reelsmith", "run"]]


def press(step: Any, by_keys: bool, word: str) -> None:
    """Press the button of the page: by Enter where the focus is, which is on it, or by a click."""
    assert step.inner_text() == word
    if by_keys:
        assert step.evaluate("step => step === document.activeElement"), word
        step.page.keyboard.press("Enter")
    else:
        step.click()


@pytest.mark.slow
@pytest.mark.parametrize("by_keys", [False, True], ids=["clicks", "keys"])
def test_six_clicks_and_one_typed_word_lead_to_a_running_training(by_keys: bool, tmp_path: Path) -> None:
    """From an empty page; the model is on disk, and is small.

    by_keys: From Prepare on, the focus stays on the button, and Enter is all that is pressed.
    """
    write_images(tmp_path / "roots" / "kittens", 3, captions=True)
    models = tmp_path / "models"
    (model,) = [one for one in find_models() if (one.family, one.task) == ("wan", "t2v-1.3B")]
    for part in model.components:
        path = models / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        option = (part.option or "").lstrip("-")
        if option:
            weights = load_file(PARTS[option])
            save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    write_tokenizer(models / "google" / "umt5-xxl")  # the check finds a fault without it: tests are offline
    clicks = 0
    with serve_runs(tmp_path / "roots", models=models) as served, open_page(f"{served.url}/new") as page:
        for label, choice in (("Model", "wan"), ("Version", "t2v-1.3B")):
            page.get_by_label(label, exact=True).select_option(choice)
            clicks += 1
            wait_until(page, "document.querySelectorAll('#task option').length > 1")
        page.get_by_text("kittens", exact=True).click()
        page.wait_for_url("**folder=**")
        page.get_by_label("Trigger word").fill("ohwx")
        step = page.locator("#step")
        step.focus()
        press(step, by_keys, "Prepare")
        page.get_by_role("button", name="Preparing …").wait_for()
        page.get_by_role("button", name="Checking …").wait_for(timeout=180 * SECONDS)
        start = page.get_by_role("button", name="Start", exact=True)
        start.wait_for(timeout=180 * SECONDS)
        assert page.locator("#standing").inner_text() == "Prepared, checked: no fault."
        press(step, by_keys, "Start")
        page.get_by_role("link", name="Show the training").wait_for(timeout=PATIENCE * MILLISECONDS)
        clicks += 3
        assert clicks <= MAX_CLICKS
        press(step, by_keys, "Show the training")
        state = page.locator("main .status").first
        begun = re.compile("caching|loading|training|sampling")
        state.filter(has_text=begun).wait_for(timeout=120 * SECONDS)
        for _ in range(2):
            served.ask(f"{urlsplit(page.url).path}do/stop", "POST", "", Origin=served.url)
        state.filter(has_text=re.compile("stopped|died")).wait_for(timeout=120 * SECONDS)
        assert page.problems == []


OPENED: list[str] | None = None  # names of files that were opened, while somebody counts them


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, Path)):
        OPENED.append(Path(arguments[0]).name)


def test_progress_reads_each_file_of_a_folder_and_the_queue_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = describe_folder(tmp_path / "set")
    queue = open_queue(Runs((tmp_path,)), read_only=False)
    queue.add(["python", "reelsmith.py", "run", str(folder)], folder)
    sys.addaudithook(watch)
    with serve_runs(tmp_path) as served:
        address = f"/new/progress?folder={quote(str(folder))}"
        served.ask(address)
        monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
        answer = served.ask(address)
        opened = list(OPENED or ())
        monkeypatch.setattr(sys.modules[__name__], "OPENED", None)
    assert answer.status == 200
    names = (*FILES, QUEUE, STATE)
    assert {name: opened.count(name) for name in names} == dict.fromkeys(names, 1)
