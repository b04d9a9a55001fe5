"""The page New: from an empty root to a finished LoRA by labels alone, and what newcomers do wrong."""

import html
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pytest
from PIL import Image

from browser.folders.captions import compute_checksum
from browser.folders.described_folder import FILES
from browser.folders.folders import list_media_folders
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import open_queue
from browser.jobs.model_files import name_download
from browser.pages.new.model_table import find_misfit
from browser.runs.runs import Runs
from downloads.listing import describe_licenses
from pocket.measure import POCKET
from project.options import MODELS, find_models
from project.recipes.reading import SHIPPED
from tests.browser.described_folders import describe as describe_folder
from tests.browser.serving import Answer, Served, plain_text, python_of, serve_runs, write_run
from tests.browser.test_accessible import assert_fits
from tests.chromium import open_page, wait_until
from tests.commands import ROOT, run_script
from tests.data_tools.captions.making import run_server
from tests.data_tools.report.making import save_image
from tests.waiting import MILLISECONDS, PATIENCE

PARTS = {name: str(ROOT / f"pocket/{name}.safetensors") for name in ("dit", "vae", "t5")}
FIELDS = {"family": "wan", "task": "t2v-1.3B", "steps": "2"} | {
    f"file_{name}": path for name, path in PARTS.items()
}
FEW = "a square --s 1 --w 32 --h 32 --f 1 --d 1\n"
SECONDS = 1000  # milliseconds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "roots").mkdir()
    return tmp_path / "roots"


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root) as served:
        yield served


def write_images(folder: Path, count: int = 12, captions: bool = False) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    caption = "a square" if captions else None
    return [save_image(folder / f"p{number:02}.png", number, (64, 64), caption) for number in range(count)]


def post(served: Served, what: str, **fields: str) -> Answer:
    return served.ask(f"/new/{what}", "POST", urlencode(fields), Origin=served.url)


def text_of(answer: Answer, place: str = "said") -> str:
    """Return the message in a page, without its marks."""
    match = re.search(rf'<p id="{place}"[^>]*>(.*?)</p>', answer.text, re.DOTALL)
    assert match is not None
    return re.sub("<[^>]*>", "", match[1]).replace("&#39;", "'").replace("&#34;", '"')


def name_field(answer: Answer, name: str) -> str:
    """Return what the first field of a name holds in a page."""
    match = re.search(rf'name="{name}" value="([^"]*)"', answer.text)
    assert match is not None
    return html.unescape(match[1])


def wait_for(served: Served, folder: Path, words: str) -> str:
    """Return the part that shows progress once it has these words."""
    address = f"/new/progress?folder={quote(str(folder))}"
    gate = threading.Event()
    text = ""
    for _ in range(600):
        text = served.ask(address).text
        if words in text:
            return text
        gate.wait(0.1)
    raise AssertionError(f"never there: {words}\n{text}")


def describe(served: Served, folder: Path, **changes: str) -> None:
    """Describe a folder as the page does, and wait for it."""
    answer = post(served, "describe", **{"folder": str(folder), **FIELDS, **changes})
    assert answer.status == 200, text_of(answer)
    wait_for(served, folder, '">prepared<')


def press(page: Any, button: str) -> None:
    page.get_by_role("button", name=button).click()


def wait_page(page: Any, words: str, seconds: int = 90) -> None:
    page.locator("#progress").get_by_text(words).first.wait_for(timeout=seconds * SECONDS)


@pytest.mark.slow
def test_twelve_dropped_pictures_become_a_lora_by_labels_alone(
    served: Served, root: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "from a camera")
    with open_page(f"{served.url}/new") as page:
        page.get_by_label("What is it?").fill("kittens")
        page.get_by_label("Choose files").set_input_files(images)
        page.wait_for_url("**folder=**")
        assert page.get_by_label("Folder").input_value() == str(root / "kittens")
        page.get_by_role("button", name="Files", exact=True).click()
        for image in images:
            page.get_by_label(f"Caption of {image.name}").fill(f"a square of noise, {image.stem}")
            page.keyboard.press("Control+Enter")
        wait_until(page, "drafts.size === 0")
        page.get_by_label("Model", exact=True).select_option("wan")
        page.get_by_label("Version").select_option("t2v-1.3B")
        page.get_by_label("Trigger word").fill("ohwx")
        page.get_by_label("Name").fill("own")
        page.get_by_label("Steps").fill("2")
        page.get_by_text("My files lie elsewhere").click()
        for name, path in PARTS.items():
            page.get_by_label(f"--{name}").fill(path)
        page.get_by_text("a Wan2.1 VAE (--vae)").wait_for()
        wait_until(page, "document.querySelector('#command').textContent.includes('t5=')")
        command = page.locator("#command").text_content()
        press(page, "Prepare")
        wait_page(page, "Training")
        wait_page(page, "no fault")

        assert_equal_to_command(command, root / "kittens", tmp_path)
        (root / "kittens/prompts.txt").write_text(FEW, encoding="utf-8")
        press(page, "Check")  # as a file has changed
        page.get_by_role("button", name="Start").wait_for(timeout=90 * SECONDS)
        page.get_by_text("All files with what is cut off").click()
        frame = page.frame_locator("iframe")
        frame.get_by_text("p00.png").first.wait_for()
        press(page, "Start")
        page.locator("#progress .finished", has_text="of the queue").wait_for(timeout=240 * SECONDS)
        assert (root / "kittens/output/own.safetensors").stat().st_size > 1000
        page.get_by_role("link", name="its page").click()
        page.get_by_role("heading", name="own").first.wait_for()
        assert page.problems == []


def assert_equal_to_command(command: str, folder: Path, tmp_path: Path) -> None:
    """The three files are those that the shown command writes in a terminal."""
    copy = tmp_path / "terminal" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*FILES))
    words = [word.replace(str(folder), str(copy)) for word in shlex.split(command.partition(" new ")[2])]
    run_script("new_project.py", *words, folder=Path.cwd())
    for name in FILES:
        assert (folder / name).read_bytes() == (copy / name).read_bytes(), name


def test_a_first_description_is_that_of_the_command(served: Served, root: Path, tmp_path: Path) -> None:
    write_images(root / "set", 2, captions=True)
    shown = served.ask(f"/new?{urlencode({'folder': str(root / 'set'), **FIELDS})}").text
    [command] = re.findall(r'<code id="command"[^>]*>(.*?)</code>', shown)
    describe(served, root / "set")
    assert_equal_to_command(html.unescape(re.sub("<[^>]*>", "", command)), root / "set", tmp_path)


def test_a_recipe_is_shown_with_what_it_was_tried_on_and_described_with(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / "recipes").mkdir()
    text = (SHIPPED / "pocket-shape.toml").read_text(encoding="utf-8")
    own = text.replace("A new shape", "<b>Mine</b>")
    (root / "recipes" / "mine.toml").write_text(own, encoding="utf-8")
    (root / "recipes" / "broken.toml").write_text("run = 1", encoding="utf-8")
    form = {"folder": str(root / "fluffy"), "family": "wan", "task": "t2v-1.3B", "recipe": "mine"}

    page = served.ask(f"/new?{urlencode(form)}").text
    other = served.ask(f"/new?{urlencode({**form, 'task': 't2v-14B'})}").text

    assert '<option value="mine" selected>mine</option>' in page
    assert '<option value="pocket-shape">pocket-shape</option>' in page
    assert "broken" not in page
    assert "&lt;b&gt;Mine&lt;/b&gt;" in page
    assert "Tried on the pocket model (2.3 million weights)" in page
    assert 'name="recipe"' not in other


def test_a_whole_model_is_described_as_the_command_does(served: Served, root: Path, tmp_path: Path) -> None:
    write_images(root / "set", 2, captions=True)
    fields = {"folder": str(root / "set"), **FIELDS, "train": "whole"}
    shown = served.ask(f"/new?{urlencode(fields)}").text
    assert '<option value="whole" selected>the whole model</option>' in shown
    assert "Each saved file has 2.8 GB" in shown
    [command] = re.findall(r'<code id="command"[^>]*>(.*?)</code>', shown)
    line = html.unescape(re.sub("<[^>]*>", "", command))
    assert "--train whole" in line
    describe(served, root / "set", train="whole")
    assert_equal_to_command(line, root / "set", tmp_path)
    written = served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    assert '<option value="whole" selected>the whole model</option>' in written
    fields |= {"family": "wan22", "task": "t2v-A14B", "train": ""}
    shown = served.ask(f"/new?{urlencode(fields)}").text
    assert '<option value="whole" disabled>the whole model</option>' in shown
    assert "Not the whole model: Wan2.2" in shown
    assert "has two transformers" in shown


def test_a_folder_of_pairs_is_offered_as_what_new_makes_of_it(
    served: Served, root: Path, tmp_path: Path
) -> None:
    write_images(root / "set", 2, captions=True)
    shutil.copytree(root / "set", root / "set" / "conditioning", ignore=shutil.ignore_patterns("*.txt"))
    fields = {"folder": str(root / "set"), "family": "stable_diffusion", "task": "xl", "trigger": "zorb"}
    shown = served.ask(f"/new?{urlencode(fields)}").text
    assert '<option value="lllite" selected>a ControlNet-LLLite</option>' in shown
    assert "--train lllite" in shown
    shown = served.ask(f"/new?{urlencode({**fields, 'train': ''})}").text
    assert '<option value="" selected>a LoRA</option>' in shown
    assert "--train lora" in shown
    # the form sends the choice that was shown for another model, or for this one
    shown = served.ask(f"/new?{urlencode({**fields, 'train': '', 'train_of': 'another'})}").text
    assert '<option value="lllite" selected>' in shown
    (subject,) = re.findall('name="train_of" value="([^"]*)"', shown)
    shown = served.ask(f"/new?{urlencode({**fields, 'train': '', 'train_of': plain_text(subject)})}").text
    assert '<option value="" selected>a LoRA</option>' in shown
    del fields["folder"]
    of_another = dict.fromkeys((name for name in FIELDS if name.startswith("file_")), "")
    describe(served, root / "set", **fields, **of_another, train="embedding")
    written = served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    assert '<option value="embedding" selected>an embedding</option>' in written


def refused(served: Served, root: Path, **changes: str) -> str:
    fields = {"folder": str(root / "set"), **FIELDS, **changes}
    answer = post(served, "describe", **fields)
    assert answer.status == 422
    if changes.get("steps"):  # what was typed is still there
        assert f'value="{changes["steps"]}"' in answer.text
    return text_of(answer)


def test_mistakes_of_a_newcomer_are_answered_with_what_to_do(
    served: Served, root: Path, tmp_path: Path
) -> None:
    assert refused(served, root, folder="") == "Choose a folder."
    empty = served.ask("/new").text
    plain = re.sub("<!--.*?-->", "", empty)
    assert f"{python_of('reelsmith.py')} new FOLDER --max_train_steps 2000" in html.unescape(plain)
    assert "No folder with clips, images or sounds yet" in empty
    assert "Choose one from the list, or drop files" in refused(served, root)
    unknown = post(served, "check", folder=str(root / "set"))  # the button takes only this part of the answer
    assert "Choose one from the list, or drop files" in text_of(unknown, "refused")
    assert "is outside the folders of this page" in refused(served, root, folder=str(tmp_path))
    assert f"{root.parent} is outside the folders" in refused(served, root, folder="../")
    (root / "set").mkdir()
    assert "has no clips, images or sounds. Drop some here first" in refused(served, root)
    write_images(root / "set", 1)
    assert refused(served, root, family="") == "Model: choose one."
    assert refused(served, root, family="sora").startswith("Model sora: choose one of wan")
    assert refused(served, root, task="").startswith("Version: choose one of t2v-1.3B")
    assert refused(served, root, steps="ten").startswith("Training steps ten: use a whole number from 1")
    assert refused(served, root, trigger="x" * 300).startswith("Trigger word has 300 characters")
    assert refused(served, root, name="../x").startswith("Name ../x: a name has no slash.")
    assert not any((root / "set" / name).exists() for name in FILES)
    for what in ("start", "try", "write", "repair"):
        answer = post(served, what, folder=str(root / "set"))
        assert answer.status == 422
        assert text_of(answer, "refused") == "It is not prepared yet: press Prepare first."
    assert post(served, "nothing", folder=str(root / "set")).status == 404


@pytest.mark.slow
def test_a_wrong_file_is_said_where_one_clicked(served: Served, root: Path) -> None:
    write_images(root / "set", 1, captions=True)
    post(served, "describe", **{"folder": str(root / "set"), **FIELDS, "file_dit": PARTS["vae"]})
    text = wait_for(served, root / "set", "not prepared")
    assert "a Wan2.1 VAE" in text or "--dit" in text
    shown = served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    assert f'value="{PARTS["vae"]}"' in shown  # the form is still that of the command
    assert not (root / "set/run.toml").exists()


@pytest.mark.slow
def test_describe_pressed_twice_runs_once(served: Served, root: Path) -> None:
    write_images(root / "set", 2, captions=True)
    fields = {"folder": str(root / "set"), **FIELDS}
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(post(served, "describe", **fields))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status for answer in answers) == [200, 422]
    [failed] = [answer for answer in answers if answer.status == 422]
    assert "already running" in text_of(failed)
    wait_for(served, root / "set", '">prepared<')


def test_a_described_folder_keeps_what_was_not_changed(served: Served, root: Path) -> None:
    write_images(root / "set", 2, captions=True)
    describe(served, root / "set")
    path = root / "set/run.toml"
    path.write_text(f"# mine\n{path.read_text()}".replace("seed = 42", "seed = 7 # lucky"), encoding="utf-8")
    before = path.read_text()

    answer = post(
        served, "describe", **{"folder": str(root / "set"), **FIELDS, "steps": "30", "name": "other"}
    )

    assert answer.status == 200
    after = before.replace("max_train_steps = 2", "max_train_steps = 30")
    for key in ("save_every_n_steps", "save_last_n_steps_state", "sample_every_n_steps"):
        after = after.replace(f"{key} = 2", f"{key} = 30")
    assert path.read_text() == after.replace('output_name = "set"', 'output_name = "other"')


@pytest.mark.slow
def test_replacing_shows_the_changes_asks_and_keeps_the_old_files(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    (folder / "prompts.txt").write_text("my own prompt\n", encoding="utf-8")
    old = {name: (folder / name).read_bytes() for name in FILES}
    mark = mark_of(served, folder)

    post(served, "describe", **{"folder": str(folder), **FIELDS, "trigger": "ohwx", "mark": mark})
    text = wait_for(served, folder, 'id="press_changes"')

    assert "-my own prompt" in text
    assert "+trigger_word = &#34;ohwx&#34;" in text
    assert {name: (folder / name).read_bytes() for name in FILES} == old
    shown = served.ask(f"/new?folder={quote(str(folder))}").text
    assert 'name="trigger" value="ohwx"' in shown  # what was asked for survives a reload
    button = 'class="main" form="press_changes">Replace the three files</button>'
    assert button in shown
    fields = {"folder": str(folder), **FIELDS, "trigger": "sks"}
    assert button not in served.ask(f"/new?{urlencode(fields)}").text  # the changes are those of another word
    assert post(served, "replace", folder=str(folder), mark="0123").status == 422
    with open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        press(page, "Replace the three files")
        wait_for(served, folder, '">prepared<')
        assert page.problems == []
    assert 'trigger_word = "ohwx"' in (folder / "dataset.toml").read_text()
    [kept] = (root / "reelsmith-bin/replaced").iterdir()
    assert {name: (kept / name).read_bytes() for name in FILES} == old


@pytest.mark.slow
def test_changes_that_were_refused_leave_all_as_it_was(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    post(served, "describe", **{"folder": str(folder), **FIELDS, "trigger": "ohwx"})
    wait_for(served, folder, 'id="press_changes"')

    assert post(served, "keep", folder=str(folder)).status == 200

    shown = served.ask(f"/new?folder={quote(str(folder))}").text
    assert 'name="trigger" value=""' in shown
    assert "Replace the three files" not in shown
    assert "no changes to make" in text_of(post(served, "replace", folder=str(folder)))


def mark_of(served: Served, folder: Path) -> str:
    text = served.ask(f"/new?folder={quote(str(folder))}").text
    match = re.search(r'name="mark" value="(\w*)"', text)
    assert match is not None
    return match[1]


@pytest.mark.slow
def test_a_second_browser_overwrites_nothing(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    mark = mark_of(served, folder)
    fields = {"folder": str(folder), **FIELDS, "mark": mark}
    assert post(served, "describe", **{**fields, "steps": "30"}).status == 200

    answer = post(served, "describe", **{**fields, "steps": "40"})

    assert (answer.status, "have changed in the meantime" in text_of(answer)) == (422, True)
    assert "max_train_steps = 30" in (folder / "run.toml").read_text()
    draft = served.ask(f"/new?{urlencode({**fields, 'steps': '40'})}")
    assert "have changed in the meantime" in text_of(draft)
    assert 'name="steps" value="30"' in draft.text


@pytest.mark.slow
def test_check_and_start_take_no_fields_that_are_not_written(served: Served, root: Path) -> None:
    folder = root / "a set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    page = served.ask(f"/new?{urlencode({'folder': str(folder)})}")
    plain = html.unescape(re.sub("<!--.*?-->", "", page.text))
    assert f"<code>{python_of('reelsmith.py')} run '{folder}' --check</code>" in plain
    shown = name_field(page, "shown")
    typed = {"folder": str(folder), "shown": shown, **FIELDS, "name": "other", "steps": "3"}

    for what in ("check", "start"):
        answer = post(served, what, **typed)
        assert answer.status == 422
        assert text_of(answer, "refused") == (
            "What you have typed is not in the files of this folder yet (Name, Training steps). "
            "Press Prepare first."
        )
    assert served.runs.list_all() == []

    # files that were changed elsewhere are what is checked: nobody has typed here
    path = folder / "run.toml"
    path.write_text(path.read_text().replace("max_train_steps = 2", "max_train_steps = 5"), encoding="utf-8")
    unchanged = {"folder": str(folder), "shown": shown, **FIELDS, "name": "a_set"}
    assert post(served, "check", **unchanged).status == 200


@pytest.mark.slow
def test_describe_heeds_the_fields_after_samples_were_saved(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    page = served.ask(f"/new?{urlencode({'folder': str(folder)})}")
    seen = {"mark": name_field(page, "mark"), "shown": name_field(page, "shown")}
    (folder / "prompts.txt").write_text(FEW, encoding="utf-8")  # as Save the samples does

    fields = {"folder": str(folder), **seen, **FIELDS, "steps": "30"}
    assert 'name="steps" value="30"' in served.ask(f"/new?{urlencode(fields)}").text  # at a reload
    assert post(served, "describe", **fields).status == 200

    assert "max_train_steps = 30" in (folder / "run.toml").read_text()
    assert (folder / "prompts.txt").read_text() == FEW


@pytest.mark.slow
def test_what_is_typed_and_not_saved_is_said_before_a_start(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 1, captions=True)
    describe(served, folder)
    with open_page(f"{served.url}/new?{urlencode({'folder': str(folder)})}") as page:
        page.get_by_label("Sample 1 prompt").fill("a square in snow")
        press(page, "Check")
        page.get_by_text("that you have typed and not saved").wait_for()
        page.get_by_text("Not saved yet. The button writes this:").wait_for()
        press(page, "Check")
        page.locator("#progress .state", has_text=re.compile("checking|no fault")).first.wait_for()


@pytest.mark.slow
def test_the_count_of_files_without_a_caption_follows_the_captions(served: Served, root: Path) -> None:
    write_images(root / "set", 2)
    with open_page(f"{served.url}/new?{urlencode({'folder': str(root / 'set')})}") as page:
        page.get_by_role("button", name="Files", exact=True).click()
        page.get_by_label("Caption of p00.png").fill("a square")
        page.keyboard.press("Control+Enter")
        page.get_by_text("2 images, 1 without caption").wait_for()
        assert page.problems == []


@pytest.mark.slow
def test_a_folder_that_is_gone_and_files_that_are_not_as_new_writes_them(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    describe(served, folder)
    (folder / "run.toml").write_text("[training]\n", encoding="utf-8")
    shown = served.ask(f"/new?folder={quote(str(folder))}")
    assert "is not as `new` writes it" in text_of(shown)
    assert "is not as `new` writes it" in text_of(post(served, "start", folder=str(folder)), "refused")
    (folder / "run.toml").unlink()
    (folder / "run.toml").mkdir()  # as a file that cannot be read
    assert served.ask(f"/new?folder={quote(str(folder))}").status == 200
    shutil.rmtree(folder)
    assert "no such folder below" in text_of(served.ask(f"/new?folder={quote(str(folder))}"))
    assert "no such folder below" in text_of(post(served, "check", folder=str(folder)))
    assert served.ask(f"/new/progress?folder={quote(str(folder))}").status == 404


@pytest.mark.slow
def test_captions_in_another_encoding_are_converted_by_a_button(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    (folder / "p00.txt").write_bytes("ein Käse, eine Tür und schöne Grüße".encode("cp1252"))
    describe(served, folder)
    wait_for(served, folder, "Convert to UTF-8")

    assert post(served, "repair", folder=str(folder)).status == 200
    wait_for(served, folder, "captions converted")
    (folder / "p01.txt").write_bytes(b"\xe4")  # too short to be sure
    assert post(served, "repair", folder=str(folder)).status == 200
    assert "--repair_captions cp1252" in wait_for(served, folder, "Read as cp1252")
    assert post(served, "repair", folder=str(folder), encoding="rot13").status == 422
    assert post(served, "repair", folder=str(folder), encoding="cp1252").status == 200
    wait_for(served, folder, ", now UTF-8: ")

    assert (folder / "p00.txt").read_text(encoding="utf-8") == "ein Käse, eine Tür und schöne Grüße"
    assert (folder / "p00.txt.bak").exists()


@pytest.mark.slow
def test_a_model_of_a_server_tries_three_and_then_writes_all(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 4)
    describe(served, folder)

    def reply(number: int, body: Any) -> str:
        del body
        return f"a <b>square</b> {number}"

    with run_server(reply) as server:
        fields = {"folder": str(folder), "engine": f"{server.address} m", "question": "What is it?"}
        assert post(served, "try", **fields).status == 200
        text = wait_for(served, folder, "nothing has been written yet")
        assert text.count("a &lt;b&gt;square&lt;/b&gt;") == 3
        assert list(folder.glob("p0*.txt")) == []
        assert "What is it?" in json.dumps(server.bodies[0])
        assert post(served, "write", **fields).status == 200
        wait_for(
            served,
            folder,
            'status finished" role="status"><span class="state">finished</span> · writing captions',
        )
    assert len(list(folder.glob("p0*.txt"))) == 4


@pytest.mark.slow
def test_only_printed_commands_of_this_folder_are_run(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2)
    describe(served, folder)
    text = wait_for(served, folder, "Do it")
    assert "caption_dataset.py" in text
    assert "Type a trigger word" in text
    for line in ("rm -rf /", "python tools/caption_dataset.py --dataset_config x.toml", ""):
        answer = post(served, "remedy", folder=str(folder), line=line)
        assert "was not printed" in text_of(answer, "refused")
    (folder / "dataset.toml").write_text('[[datasets]]\nimage_directory = "/etc"\n', encoding="utf-8")
    for what in ("try", "repair"):
        assert "outside the folders" in text_of(post(served, what, folder=str(folder)), "refused")


@pytest.mark.slow
def test_a_model_that_is_to_be_loaded_needs_its_licences_accepted(served: Served, root: Path) -> None:
    folder = root / "set"
    write_images(folder, 2, captions=True)
    fields = {name: text for name, text in FIELDS.items() if not name.startswith("file_")}
    post(served, "describe", **{"folder": str(folder), **fields, "family": "krea2", "task": "raw"})
    wait_for(served, folder, '">prepared<')
    text = served.ask(f"/new?folder={quote(str(folder))}").text
    assert re.search(r">Download the model \([\d.]+ GB\)</button>", text)
    assert "are downloaded first, under these licenses" in text
    assert 'href="https://github.com/krea-ai' in text
    assert "There is no login on this machine" in text or "There is a login" in text

    answer = post(served, "start", folder=str(folder))

    assert "accept them" in text_of(answer, "refused")
    assert "of the queue" not in answer.text


def test_missing_captions_come_before_a_download(served: Served, root: Path) -> None:
    folder = root / "bare"
    write_images(folder, 3, captions=False)
    (folder / "broken.jpg").write_bytes(b"no image")
    fields = {name: text for name, text in FIELDS.items() if name not in ("trigger",) and "file_" not in name}
    post(served, "describe", **{"folder": str(folder), **fields, "family": "krea2", "task": "raw"})
    wait_for(served, folder, '">prepared<')
    address = f"{served.url}/new?folder={quote(str(folder))}"
    with open_page(address) as page:
        text = page.locator("#next").inner_text()
        assert "Still missing: captions of 4 images, or a trigger word." in text
        assert "Download the model" not in text
        page.locator("#next").get_by_text("Type a trigger word").click()
        assert page.evaluate("document.activeElement.id") == "trigger"
        page.locator("#step").click()
        assert page.evaluate("document.activeElement.id") == "engine"
        for number in range(3):
            (folder / f"p{number:02}.txt").write_text("a cat", encoding="utf-8")
        (folder / "broken.txt").write_text("a cat", encoding="utf-8")
        wait_until(page, "document.querySelector('#step').textContent === 'Look at the files'")
        assert page.locator(".leave").count() == 1  # one button for the broken file
        page.locator(".leave").click()
        wait_until(page, "document.querySelector('#step').textContent.startsWith('Download the model')")
        assert page.problems == []


def test_a_download_that_fails_says_so_at_its_button(served: Served, root: Path) -> None:
    folder = root / "unloaded"
    write_images(folder, 2, captions=True)
    fields = {name: text for name, text in FIELDS.items() if not name.startswith("file_")}
    post(served, "describe", **{"folder": str(folder), **fields, "family": "krea2", "task": "raw"})
    wait_for(served, folder, '">prepared<')
    jobs = BackgroundJobs(open_queue(Runs([root]), read_only=False))
    name = name_download(MODELS, "krea2", "raw")
    jobs.start(name, ["python", "tools/download.py", "--family", "krea9"], root)
    jobs.wait(name, 60)
    [model] = [one for one in find_models() if (one.family, one.task) == ("krea2", "raw")]
    [license_line, *_] = describe_licenses(model)
    job = jobs.find(name)
    assert job is not None
    log = job.log
    log.write_text(f"{license_line}\n{log.read_text(encoding='utf-8').strip()}\n", encoding="utf-8")

    text = served.ask(f"/new?folder={quote(str(folder))}").text

    assert "The model could not be downloaded:" in text
    assert license_line not in html.unescape(text)  # it is no part of the error
    assert "krea9" in text.split('id="next"')[1]
    assert 'id="accept" checked' in text


def test_mistakes_are_said_while_one_types(served: Served, root: Path) -> None:
    """Each part of the page asks again while one types, and takes its own piece of the answer."""
    typed = {"folder": str(root / "nothing"), "steps": "abc", "trigger": "ü" * 300, "name": "a/b"}
    typed["family"] = "anima"
    text = html.unescape(served.ask(f"/new?{urlencode({**typed, 'task': ''})}", HX_Request="true").text)
    pieces = {
        name: text.split(f'id="{name}"')[1].split("</p>")[0]
        for name in ("folder_fault", "word", "free", "hours")
    }
    assert "no such folder below" in pieces["folder_fault"]
    assert "Training steps abc: use a whole number" in pieces["hours"]
    assert "a name has no slash" in pieces["free"]
    assert 'role="alert"' in pieces["word"]
    assert '<option value="base" selected>' in text
    for name, field in (("word", "#trigger"), ("free", "#name"), ("hours", "#steps")):
        assert f"input delay:300ms from:{field}" in pieces[name]
    right = html.unescape(served.ask(f"/new?{urlencode({'steps': '2,000', 'trigger': 'zorb'})}").text)
    assert "--max_train_steps 2000" in right.split('id="next"')[1]
    assert 'role="alert"' not in right.split('id="hours"')[1].split("</p>")[0]


def test_a_folder_that_cannot_be_is_said_at_once_with_its_reason(served: Served, root: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty" / "note.txt").write_text("x", encoding="utf-8")
    (picture, *_) = write_images(root / "set", 1)
    wrong = {
        str(picture): f"{picture} is a file. Enter its folder: {picture.parent}",
        str(root / "empty"): "has no clips, images or sounds. Drop some here first.",
        str(root / "none"): "no such folder below",
    }
    if os.name != "nt":
        wrong |= dict.fromkeys((r"C:\Users\me", "d:/x", r"\\nas\x"), "is a Windows path")
    for folder, reason in wrong.items():
        page = html.unescape(served.ask(f"/new?{urlencode({'folder': folder, 'family': 'wan'})}").text)
        assert reason in re.sub("<!--.*?-->", "", page).split('id="folder_fault"')[1].split("</p>")[0]
    (root / "empty" / "inner").mkdir()  # that may hold media
    for right in (root / "empty", root / "set"):
        page = served.ask(f"/new?{urlencode({'folder': str(right), 'family': 'wan'})}").text
        assert 'role="alert"' not in page.split('id="folder_fault"')[1].split("</p>")[0]


def test_the_page_of_a_check_runs_no_script_and_has_no_origin(served: Served, root: Path) -> None:
    write_images(root / "set", 1)
    (root / "set/check.html").write_text("<script>parent.x = 1</script><p>hello", encoding="utf-8")
    address = f"/new/checked?folder={quote(str(root / 'set'))}"
    answer = served.ask(address)
    policy = answer.headers["content-security-policy"]
    assert (answer.status, "sandbox;" in policy, "script-src" in policy) == (200, True, False)
    (root / "set/check.html").unlink()
    (root / "secret.html").write_text("x", encoding="utf-8")
    assert served.ask(address).status == 404


def test_a_lora_of_that_name_is_not_trained_over(served: Served, root: Path) -> None:
    write_images(root / "set", 1)
    (root / "set/output").mkdir()
    (root / "set/output/set.safetensors").touch()
    assert 'name="name" value="set-2"' in served.ask(f"/new?folder={quote(str(root / 'set'))}").text
    typed = served.ask(f"/new?{urlencode({'folder': str(root / 'set'), 'name': 'set', 'steps': '2'})}").text
    assert "Take set-2" in typed


def test_a_task_of_the_table_is_taken_where_both_models_have_one_of_its_name(served: Served) -> None:
    with open_page(f"{served.url}/new?family=ltx_25&task=v") as page:
        page.locator("#table summary").click()
        for task in ("av", "v"):  # of another model, then of the same
            page.locator(f'.take[data-family="ltx_2"][data-task="{task}"]').click()
            command = f"--family ltx_2 --task {task}"
            page.wait_for_function(
                "words => document.getElementById('command').textContent.includes(words)", arg=command
            )
            page.wait_for_load_state("networkidle")
            assert page.locator("#task").input_value() == task


def test_nothing_is_written_where_one_may_only_look(root: Path) -> None:
    write_images(root / "set", 2)
    with serve_runs(root, read_only=True) as served:
        shown = served.ask(f"/new?folder={quote(str(root / 'set'))}").text
        assert "<button>" not in shown
        assert "Leave out" not in shown
        for what in ("describe", "start", "check", "file", "upload", "rows/00/move"):
            assert post(served, what, folder=str(root / "set"), **FIELDS).status == 403


def test_names_and_captions_are_text(served: Served, root: Path) -> None:
    folder = root / "<b>set"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "<img src=x onerror=alert(1)>.png")
    (folder / "<img src=x onerror=alert(1)>.txt").write_text("<script>alert(2)</script>", encoding="utf-8")
    with open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        page.get_by_role("button", name="Files", exact=True).click()
        page.get_by_label("Caption of <img").wait_for()
        assert page.get_by_label("Caption of <img").input_value() == "<script>alert(2)</script>"
        assert page.locator(".file img").count() == 1
        assert page.problems == []


@pytest.mark.slow
def test_what_is_typed_survives_a_reload(served: Served, root: Path) -> None:
    write_images(root / "set", 2)
    with open_page(f"{served.url}/new") as page:
        page.get_by_text("set", exact=True).click()
        page.get_by_text("in a table").click()
        page.locator("tr", has_text="t2v-1.3B").get_by_role("button", name="Take").click()
        wait_until(page, "document.getElementById('task').value === 't2v-1.3B'")
        page.get_by_label("Trigger word").fill("ohwx")
        page.reload()
        fields = [
            page.get_by_label(label, exact=True).input_value()
            for label in ("Folder", "Model", "Version", "Trigger word")
        ]
        assert fields == [str(root / "set"), "wan", "t2v-1.3B", "ohwx"]
        assert parse_qs(urlsplit(page.url).query)["task"] == ["t2v-1.3B"]
        assert page.problems == []


def test_files_are_dropped_anywhere_and_refusals_are_said(served: Served, root: Path) -> None:
    drop = """([name, text]) => {
      const data = new DataTransfer();
      data.items.add(new File([text], name));
      const how = { bubbles: true, cancelable: true, dataTransfer: data };
      document.body.dispatchEvent(new DragEvent("drop", how));
    }"""
    with open_page(f"{served.url}/new") as page:
        page.evaluate(drop, ["evil.py", "import os"])
        press(page, "Put them there")
        page.get_by_text("evil.py: only images, clips, audio files").wait_for()
        page.get_by_text("0 of 1 taken").wait_for()
        assert list(root.iterdir()) == []
        page.evaluate(drop, ["a.txt", "a cat"])
        press(page, "Put them there")
        page.wait_for_url("**folder=**")
        page.evaluate(drop, ["a.txt", "another cat"])  # what was chosen is folded, and opens to say it
        page.get_by_text("a.txt already exists").wait_for()
    [path] = root.rglob("a.txt")
    assert path.read_text() == "a cat"


def test_folders_of_image_trainers_are_one_choice(served: Served, root: Path) -> None:
    """As `new` takes them: regularization pictures belong to it. A described folder is a choice too."""
    for place in ("mine/img/10_ohwx man", "mine/reg/1_man", "flat/2_ohwx dog"):
        write_images(root / place, 2)
    write_images(root / "plain" / "day", 1)
    write_images(root / "plain" / "day" / "masks", 1)  # which are no pictures to learn
    listed = {one.path: one.summary for one in list_media_folders(Runs([root]))}
    assert listed[root / "mine"] == "2 images in 1 folder, 2 without caption"
    assert listed[root / "flat"] == "2 images in 1 folder, 2 without caption"
    assert listed[root / "plain" / "day"] == "1 image, 1 without caption"
    left_out = {root, root / "plain", root / "mine" / "img", root / "mine" / "reg"}
    assert not {*left_out, root / "plain" / "day" / "masks"} & listed.keys()
    (root / "plain" / "run.toml").touch()
    assert root / "plain" in {one.path for one in list_media_folders(Runs([root]))}


def test_many_folders_are_shown_as_one_scrolls(served: Served, root: Path) -> None:
    for number in range(60):
        (root / f"f{number:02}").mkdir()
        (root / f"f{number:02}/a.png").write_bytes(b"x")
    with open_page(f"{served.url}/new") as page:
        assert page.locator(".folders li").count() == 25
        page.locator(".folders li").last.scroll_into_view_if_needed()
        page.get_by_text("f47", exact=True).wait_for()
        page.locator(".folders li").last.scroll_into_view_if_needed()
        page.get_by_text("f59", exact=True).wait_for()
        assert page.locator(".folders li").count() == 60


LABELS = """[...document.querySelectorAll('label, [aria-label]')]
  .filter(one => one.checkVisibility())
  .map(one => (one.getAttribute('aria-label') ?? one.innerText.split('\\n')[0]).trim().toLowerCase())"""


@pytest.mark.slow
def test_the_page_fits_and_each_label_is_there_once(served: Served, root: Path) -> None:
    write_images(root / "set", 2)
    describe(served, root / "set", trigger="ohwx")
    with open_page(f"{served.url}/new?folder={quote(str(root / 'set'))}") as page:
        page.locator("#text-prompts").wait_for(state="attached")  # it is read after the page
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.evaluate("document.querySelector('#captions').open = true")  # of the tabs one is open
        page.locator("#choose").scroll_into_view_if_needed()
        page.locator(".file").nth(1).wait_for()
        fixed = {"folder", "model", "version", "trigger word", "name", "training steps"}
        labels = [label for label in page.evaluate(LABELS) if label]
        assert {label: labels.count(label) for label in fixed} == dict.fromkeys(fixed, 1)
        assert_fits(page)
        assert page.problems == []


def test_a_path_in_quotes_is_taken(served: Served, root: Path) -> None:
    write_images(root / "my set", 2)
    for quote_mark in "\"'":
        page = served.ask(f"/new?folder={quote(quote_mark + str(root / 'my set') + quote_mark)}").text
        assert "no such folder" not in page
        assert "2 images" in page
    file = root / "my model.safetensors"
    file.touch()
    message = post(served, "file?option=dit", file_dit=f'"{file}"').text
    assert "absolute path" not in message
    assert "It is empty" in message


def test_a_folder_outside_is_named_with_the_command_that_includes_it(served: Served, root: Path) -> None:
    outside = root.parent / "else where"
    outside.mkdir()
    for typed in (f'"{outside}"', str(outside)):
        message = html.unescape(text_of(served.ask(f"/new?folder={quote(typed)}")))
        assert f"{outside} is outside the folders of this page" in message
    assert f"{python_of('tools/run_browser.py')} {root} '{outside}'" in message
    assert "no such folder" in text_of(served.ask(f"/new?folder={quote(str(outside / 'none'))}"))
    assert "there is no such user" in text_of(served.ask("/new?folder=~nobody-of-this-name/x"))


def test_files_of_a_running_training_are_not_changed(served: Served, root: Path) -> None:
    folder = describe_folder(root / "set")
    write_run(folder / "output", "own", kind=None)
    before = (folder / "run.toml").read_bytes()
    fields = {"folder": str(folder), "family": "wan", "task": "t2v-1.3B", "name": "own", "steps": "30"}
    answer = post(served, "describe", **fields)
    assert (answer.status, (folder / "run.toml").read_bytes()) == (422, before)
    assert "stop it first, or wait until it has ended" in text_of(answer)


def test_describe_says_what_it_wrote_and_keeps_place_and_focus(served: Served, root: Path) -> None:
    folder = describe_folder(root / "set", save_every_n_steps=10)
    with open_page(f"{served.url}/new?folder={quote(str(folder))}") as page:
        page.get_by_label("Training steps", exact=True).fill("300")
        page.get_by_role("button", name="Prepare").focus()
        place = page.evaluate("scrollY")
        with page.expect_navigation():
            page.get_by_role("button", name="Prepare").press("Enter")
        page.get_by_text("Written into run.toml: max_train_steps = 300, save_every_n_steps = 50.").wait_for()
        page.wait_for_function("document.activeElement.id === 'step'")
        assert abs(page.evaluate("scrollY") - place) < 200
        page.get_by_label("Training steps", exact=True).fill("301")
        assert page.locator("#written").text_content() == ""
        assert page.problems == []


def test_no_button_changes_the_settings_of_a_running_training(served: Served, root: Path) -> None:
    folder = describe_folder(root / "set")
    run, dataset = folder / "run.toml", folder / "dataset.toml"
    before = run.read_bytes(), dataset.read_bytes()
    write_run(folder / "output", "own", kind=None)
    forms = {
        "settings/save": {
            "part": "run.toml",
            "text": run.read_text("utf-8").replace("steps = 10", "steps = 12"),
        },
        "settings/look": {"part": "dataset.toml", "text": f"{dataset.read_text('utf-8')}# x\n"},
        "memory/switch": {"swap": "3", "size": "24"},
        "samples/save": {"complete": "yes", "every": "7"},
    }
    for address, fields in forms.items():
        of = run if fields.get("part") != "dataset.toml" else dataset
        marks = {"have": compute_checksum(of.read_bytes()), "have run": compute_checksum(run.read_bytes())}
        if address.startswith("samples"):
            marks["have"] = compute_checksum((folder / "prompts.txt").read_bytes())
        answer = post(served, address, folder=str(folder), **fields, **marks)
        assert "stop it first, or wait until it has ended" in answer.text, address
        assert (run.read_bytes(), dataset.read_bytes()) == before
    prompts = {"part": "prompts.txt", "text": "another one\n"}
    prompts["have"] = compute_checksum((folder / "prompts.txt").read_bytes())
    assert "Saved into prompts.txt" in post(served, "settings/save", folder=str(folder), **prompts).text


def test_a_file_that_does_not_fit_is_said_before_describe(served: Served) -> None:
    """By the check of `new` itself, which takes the same file of its own model."""
    dit = str(POCKET / "dit.safetensors")
    model = {"family": "wan", "task": "t2v-1.3B"}
    for option, expected in (("vae", "is not a VAE of Wan2.1 or Wan2.2"), ("dit", ""), ("lora", "")):
        fields = {**model, f"file_{option}": dit}
        look = post(served, f"file?option={option}", **fields)
        assert f'hx-post="/new/fits?option={option}"' in look.text
        if option != "lora":
            assert expected in find_misfit(**model, option=option, text=dit)  # which takes seconds once
        message = post(served, f"fits?option={option}", **fields)
        assert (message.status, expected in message.text, message.text == "") == (200, True, expected == "")
    assert "/new/fits" not in post(served, "file?option=dit", file_dit=dit).text
    assert "/new/fits" not in post(served, "file?option=dit", **model, file_dit="").text
    gone = post(served, "fits?option=dit", **model, file_dit=f"{dit}.none")
    assert gone.text == ""


def test_what_a_model_file_is_stays_when_the_fields_around_it_are_read_later(served: Served) -> None:
    query = urlencode({"family": "wan", "task": "t2v-1.3B", "file_vae": PARTS["vae"]})
    with open_page(f"{served.url}/new?{query}") as page:
        page.get_by_text("a Wan2.1 VAE (--vae)").wait_for()
        page.route("**/new?**", lambda route: (page.wait_for_timeout(500), route.continue_()))
        with page.expect_response(lambda answer: "/new?" in answer.url and "steps=7" in answer.url):
            page.get_by_label("Steps").fill("7")
            page.get_by_label("Steps").press("Tab")
        page.wait_for_timeout(1500)
        assert page.locator("#is_vae").inner_text().startswith("a Wan2.1 VAE (--vae)")


@pytest.mark.slow
def test_a_page_that_does_nothing_follows_what_another_one_does(served: Served, root: Path) -> None:
    """Else its button would show the command for a folder that is not described yet, and run another."""
    folder = root / "set"
    write_images(folder, 2, captions=True)
    with open_page(f"{served.url}/new?{urlencode({'folder': str(folder)})}") as page:
        page.wait_for_timeout(1500)
        assert "--dry_run" not in page.locator("#command").inner_text()
        describe(served, folder)
        page.get_by_role("heading", name="Training", exact=True).wait_for(timeout=PATIENCE * MILLISECONDS)
        wait_until(page, f"document.getElementById('steps').value === '{FIELDS['steps']}'")  # loaded again
        assert page.get_by_label("Version").input_value() == FIELDS["task"]


def test_the_counts_of_a_folder_agree_with_its_rows_and_with_what_new_takes(tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "my set"
    write_images(folder, 3)
    for name in ("bad.png", ".hidden.png"):
        (folder / name).touch()
    first, second, third = sorted(folder.glob("[!.b]*.png"))
    first.with_suffix(".txt").write_text("a", encoding="utf-8")
    second.with_suffix(".txt").touch()
    with serve_runs(tmp_path / "roots") as served:
        page = served.ask(f"/new?{urlencode({'folder': str(folder)})}").text
        rows = served.ask(f"/new/rows/{str(folder).encode().hex()}/items?from=0&count=9").json()
    assert "4 images, 3 without caption, 1 cannot be read" in page
    assert rows["counts"] == {"": 4, "uncaptioned": 3}
    assert [row["pictures"][0]["name"] for row in rows["files"] if row["faults"]] == ["bad.png"]
    assert third.is_file()
