"""The page that compares saved files: what it shows of each, and the clips that it has made."""

import hashlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from safetensors.numpy import save_file

from browser.jobs.jobs import WAITING, JobQueue
from browser.runs.comparable_runs import _read_commands
from browser.runs.runs import FINISHED
from modules.media.writing import write_png
from tests.browser.serving import Answer, Served, serve_runs, write_run
from tests.browser.test_accessible import axe, list_errors  # noqa: F401  # a fixture
from tests.browser.test_jobs import wait_for_states
from tests.chromium import open_page, wait_until
from tests.pocket.test_training import cached, trained  # noqa: F401  # fixtures
from training.reports.history import History, PageCommand, describe_process, history_path

SECRET = "what nobody may read"
COMMAND = "python wan_generate_video.py --task t2v-1.3B --dit 'my models/dit.safetensors' --vae vae.pth "
COMMAND += "--t5 t5.pth --lora_weight out/x/best.safetensors --prompt 'a cat' --video_size 32 32 "
COMMAND += "--infer_steps 2 --seed 5 --save_path out/x/generated"
PROMPTS = ("a dog", "two <b>dogs")
IMAGE = np.zeros((32, 32, 3), np.uint8)


def write_comparable(folder: Path, name: str = "x", command: str = COMMAND, **told: Any) -> None:
    """A run with files of steps 2, 4 and 6, samples of two prompts at 2 and 4, the lowest loss at 4."""
    write_run(folder, name, **told)
    history = History(history_path(folder, name), 1, 6)
    for step, loss in ((2, 0.3), (4, 0.2), (6, 0.25)):
        history.add(step, saved=f"{name}-step{step}.safetensors")
        (folder / f"{name}-step{step}.safetensors").write_bytes(f"{name} {step}".encode())
        history.add(step, validation={"validation/loss": loss})
        if step < 6:
            files = {str(index): f"{name}_{step}_{index}.png" for index in (0, 1)}
            history.add(
                step, samples=f"{step:06d}", files=files, prompts=dict(zip("01", PROMPTS, strict=True))
            )
            for file in files.values():
                tags = {"bt_seeds": "9", "bt_infer_steps": "3", "bt_height": "32", "bt_width": "64"}
                write_png(folder / "sample" / file, IMAGE, tags)
    history.add(6, commands=[["Generate with it", command, command, ""]])
    history.flush()


def write_clip(path: Path, lora: Path | None, prompt: str = "a dog", **tags: str) -> None:
    """A picture as tools/compare.py writes it."""
    path.parent.mkdir(exist_ok=True)
    told = {"bt_prompt": prompt, "bt_seeds": "9", **tags}
    if lora is not None:
        digest = hashlib.sha256(lora.read_bytes()).hexdigest()
        told |= {"bt_lora_0": f"{lora.name}: 1.0", "bt_lora_sha256_0": digest, **tags}
    write_png(path, IMAGE, told)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the run x, as its command has it, beside which lies a secret."""
    (tmp_path / "hid7x2.txt").write_text(SECRET, encoding="utf-8")
    write_comparable(tmp_path / "out" / "x")
    return tmp_path / "out" / "x"


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serve_runs(folder.parent) as served:
        yield served


def form(served: Served, steps: Sequence[int] = (), run: str = "x", **more: object) -> str:
    id = served.of(run).split("/")[2]
    files = [f"{id}/{run}-step{step}.safetensors" for step in steps]
    return urlencode({"run": id, "file": files, **more}, doseq=True)


def show(served: Served, *given: object, **more: object) -> str:
    answer = served.ask(f"/compare?{form(served, *given, **more)}")  # type: ignore[arg-type]
    assert answer.status == 200
    return answer.text


def make(served: Served, *given: object, **more: object) -> Answer:
    body = form(served, *given, **more)  # type: ignore[arg-type]
    return served.ask("/compare", "POST", body, Origin=served.url)


def jobs(folder: Path) -> list[list[str]]:
    return [job.argv for job in JobQueue(folder.parent / "reelsmith-queue").jobs()]


def test_two_files_of_one_step_show_its_sample_in_places_of_their_own(served: Served, folder: Path) -> None:
    history = History(history_path(folder, "x"), 1, 6)
    history.add(4, saved="x-step4-last.safetensors")
    history.flush()
    (folder / "x-step4-last.safetensors").write_bytes(b"of the same step")

    page = show(served, (4, "4-last"), prompt=PROMPTS[0])

    ids = re.findall(r'<span id="([^"]+)" data-src="[^"]+x_4_0.png"', page)
    assert len(ids) == len(set(ids)) == 2


def test_samples_of_a_file_and_clips_of_its_content_are_shown_and_the_best_is_marked(
    served: Served, folder: Path
) -> None:
    clips, file = folder / "compare", folder / "x-step6.safetensors"
    write_clip(clips / "001_9_a_000000.png", file)
    write_clip(clips / "001_9_without-LoRA_000000.png", None)
    write_clip(clips / "001_9_b_000000.png", file, "two <b>dogs", bt_lora_0="x: 0.5")
    (clips / ".002_9_c_000000.png.1.tmp").write_bytes(b"half")

    page = show(served, (4, 6), prompt=PROMPTS)

    head, body = page.partition("<thead>")[2].split("</thead>")
    places = [head.index(word) for word in ("without LoRA", "step 4", "best validation", "step 6")]
    assert places == sorted(places)
    assert head.count("best validation") == 1
    cells = [cell.partition("</td>")[0] for cell in body.split("<td>")[1:]]
    shown = ["001_9_without-LoRA", "x_4_0.png", "001_9_a", "not made", "x_4_1.png", "not made"]
    assert [name in cell for name, cell in zip(shown, cells, strict=True)] == [True] * 6
    assert "Not made yet: 1 of 4." in page
    assert "two &lt;b&gt;dogs" in page
    assert served.ask(served.of("x", "compare/001_9_a_000000.png")).body.startswith(b"\x89PNG")
    file.write_bytes(b"another training's")
    assert "Not made yet: 2 of 4." in show(served, (4, 6), prompt=PROMPTS)


def test_a_page_begins_with_the_best_file_and_the_one_before_and_shows_equal_ones_once(
    served: Served, folder: Path
) -> None:
    names = ("step 2", "step 4", "step 6", "x <")
    history = History(history_path(folder, "x"), 1, 6)
    history.add(6, saved="x-step6_zorb.safetensors")  # a word, which is no LoRA to compare
    history.flush()
    (folder / "x-step6_zorb.safetensors").write_bytes(b"vectors")
    page = show(served)
    assert [f" checked> {name}" in page for name in names] == [True, True, False, False]
    assert "zorb" not in page

    for name in ("x-step6", "x"):
        save_file({"a": np.ones(3)}, folder / f"{name}.safetensors", {"sshs_model_hash": "7" * 64})

    page = show(served)
    assert [f"> {name}" in page for name in names] == [True, True, False, True]
    assert "the same weights as x-step6.safetensors" in served.ask(served.of("x")).text
    assert "choose a run" in served.ask("/compare").text


def test_missing_clips_become_one_job_for_equal_files_with_the_settings_of_the_samples(
    served: Served, folder: Path
) -> None:
    more = {"prompt": ["a dog"], "more": "a bird --d 3\n\na fish"}
    assert "Not made yet: 5 of 6." in show(served, (4, 6), **more)

    assert make(served, (4, 6), **more).status == 303
    assert make(served, (4, 6), **more).status == 303  # they are asked for: nothing to add

    first, second = sorted(jobs(folder.parent / "x"), key=len)
    own, both = (Path(argv[argv.index("--from_file") + 1]) for argv in (first, second))
    file = str(folder / "x-step6.safetensors")
    expected = ["python", "tools/compare.py", "--family", "wan", "--lora", file, "--task", "t2v-1.3B"]
    expected += ["--dit", "my models/dit.safetensors", "--vae", "vae.pth", "--t5", "t5.pth"]
    expected += ["--video_size", "32", "32", "--infer_steps", "2", "--seed", "0"]
    assert first == [*expected, "--from_file", str(own), "--save_path", str(folder / "compare")]
    texts = own.read_text(encoding="utf-8"), both.read_text(encoding="utf-8")
    settings = "a dog --seed 9 --video_size 32 64 --infer_steps 3\n"
    assert texts == (settings, "a bird --d 3\na fish --seed 5\n")
    assert second[5:7] == [str(folder / "x-step4.safetensors"), file]
    (job, _) = JobQueue(folder.parent / "reelsmith-queue").jobs()
    assert job.folder == str(folder.parent.parent)  # where `out/x` was typed
    assert show(served, (4, 6), **more).count(f"job {job.id}: {WAITING}") >= 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (COMMAND.replace("--vae vae.pth", "--vae VAE_FILE"), "trained without --vae"),
        (COMMAND.replace("--lora_weight", "--lora_weight_high_noise"), "no LoRA that can be compared"),
        (COMMAND.replace("best.safetensors", "best.safetensors fast.safetensors"), "a second LoRA"),
        ("python rm.py --dit x", "no generation command"),
        ("python 'wan_generate_video.py", "no generation command"),
    ],
)
def test_what_cannot_be_made_is_told_and_no_job_is_added(
    served: Served, folder: Path, command: str, message: str
) -> None:
    write_comparable(folder.parent / "y", "y", command)

    assert message in show(served, (6,), "y")
    make(served, (6,), "y")

    assert jobs(folder) == []


def test_a_history_decides_neither_where_is_written_nor_which_other_files_are_read(
    served: Served, folder: Path
) -> None:
    evil = f"{COMMAND} --console_log_file /tmp/evil --config_file=/tmp/evil --save_path=/tmp/evil"
    write_comparable(folder.parent / "y", "y", evil)
    assert make(served, (6,), "y").status == 303
    assert all("evil" not in word for job in jobs(folder) for word in job)


def test_files_of_two_models_are_not_compared(served: Served, folder: Path) -> None:
    write_comparable(folder.parent / "y", "y", COMMAND.replace("wan_generate", "hv_generate"))

    both = f"{form(served, (6,))}&{form(served, (6,), 'y')}"

    message = "Only files of the same model can be compared: x: Wan, y: HunyuanVideo"
    assert message in served.ask(f"/compare?{both}").text
    assert served.ask("/compare", "POST", both, Origin=served.url).status == 422
    assert jobs(folder) == []


def test_what_is_to_be_chosen_is_said_until_something_is_compared(served: Served, folder: Path) -> None:
    assert "Choose a run above: " in served.ask("/compare").text
    page = show(served, (4, 6))
    assert "Choose a run above" not in page
    assert "Tick a prompt" not in page
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "None of these runs has a saved file: " in show(served)


def test_a_run_without_a_saved_file_is_listed_and_cannot_be_chosen(served: Served, folder: Path) -> None:
    write_comparable(folder.parent / "y", "y")
    assert re.search('<option value="[^"]*">y, Wan</option>', served.ask("/compare").text)
    for path in (folder.parent / "y").glob("*.safetensors"):
        path.unlink()
    (folder.parent / "y" / "yes.safetensors").touch()  # of another run
    listed = served.ask("/compare").text
    assert re.search('<option value="[^"]*" disabled>y, Wan · no saved file yet</option>', listed)
    assert re.search('<option value="[^"]*">x, Wan</option>', listed)


def test_a_run_without_samples_asks_for_a_prompt(served: Served, folder: Path) -> None:
    history = History(history_path(folder.parent / "bare", "bare"), 1)
    start = {"model": "wan", "total_steps": 10, "changed": [], "unchanged": [], "listens": True}
    history.add(0, started={**start, "process": describe_process()})
    history.add(3, saved="bare.safetensors")
    history.add(3, commands=[["Generate with it", COMMAND, COMMAND, ""]])
    history.flush()
    (folder.parent / "bare" / "bare.safetensors").write_bytes(b"0123456789")
    assert "Tick a prompt, or type one" in show(served, run="bare")


def test_with_read_only_there_is_no_button_that_makes_clips(served: Served, folder: Path) -> None:
    assert 'hx-post="/compare"' in show(served, (6,))
    with serve_runs(folder.parent, read_only=True) as careful:
        assert 'hx-post="/compare"' not in show(careful, (6,))


def test_no_way_leads_out_of_the_folders(served: Served, folder: Path) -> None:
    hidden, clip = folder.parent.parent / "hid7x2.txt", "001_9_a_000000.png"
    (folder / "compare").mkdir()
    if sys.platform != "win32":
        (folder / "compare" / clip).symlink_to(hidden)
        (folder / "x-step4.safetensors").unlink()
        (folder / "x-step4.safetensors").symlink_to(hidden)
    for name in (clip, "../../../hid7x2.txt", "001_9_%2e%2e%2f%2e%2e%2fhid7x2.png", "%2e%2e/x.png"):
        answer = served.ask(served.of("x", f"compare/{name}"))
        assert (answer.status, SECRET in answer.text) == (404, False)
    id = served.of("x").split("/")[2]
    for file in ("../../hid7x2.txt", "x-history.jsonl", hidden, "x-step4.safetensors"):
        page = served.ask(f"/compare?{urlencode({'file': f'{id}/{file}'})}")
        assert "hid7x2" not in page.text.partition("<thead>")[2]
        assert "step4</th>" not in page.text.replace(" ", "")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_clips_in_a_folder_that_is_a_link_are_neither_shown_nor_made(served: Served, folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    write_clip(outside / "001_9_a_000000.png", folder / "x-step6.safetensors")
    (folder / "compare").symlink_to(outside)

    page = show(served, (6,))
    make(served, (6,))

    assert "001_9_a" not in page
    assert "is a link" in page
    assert [path.name for path in outside.iterdir()] == ["001_9_a_000000.png"]


def test_the_options_of_a_history_have_the_limits_of_its_folder(served: Served, folder: Path) -> None:
    assert make(served, (6,), more="a dog").status == 303
    (job,) = JobQueue(folder.parent / "reelsmith-queue").jobs()
    assert job.within == str(folder)


@pytest.mark.slow
def test_a_clip_of_the_pocket_model_is_made_by_the_queue(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, queue = trained.parent, JobQueue(tmp_path / "reelsmith-queue")
    with serve_runs(folder, queue=queue) as served:
        id, more = served.runs.list_all()[0].id, "a red blorp moving up --s 2"
        asked = urlencode({"run": id, "more": more})
        assert "Not made yet: 1 of 1." in served.ask(f"/compare?{asked}").text
        assert served.ask("/compare", "POST", asked, Origin=served.url).status == 303
        assert "job 1: waiting" in served.ask(f"/compare?{asked}").text
        queue.begin_work()
        try:
            wait_for_states(queue, FINISHED)
        finally:
            queue.end_work()

        page = served.ask(f"/compare?{asked}").text
        assert "not made" not in page
        assert page.count('data-src="/run/') == 2  # with LoRA and without
        (clip,) = folder.glob("compare/001_*blorp*.mp4")
        assert served.ask(served.of("blorp", f"compare/{clip.name}")).body == clip.read_bytes()


@pytest.mark.slow
def test_the_page_in_a_browser(axe: str, served: Served, folder: Path) -> None:  # noqa: F811
    write_clip(folder / "compare" / "001_9_without-LoRA_000000.png", None)
    with open_page(f"{served.url}/compare?{form(served, (4, 6), prompt=PROMPTS)}") as page:
        page.evaluate(axe)
        assert list_errors(page) == []
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.click("text=Make them")
        page.wait_for_selector("text=job 1: waiting")
        assert page.locator("text=Not made yet").count() == 0
        write_clip(folder / "compare" / "001_9_a_000000.png", folder / "x-step6.safetensors")
        page.evaluate("ask()")
        wait_until(page, "document.querySelectorAll('.grid [data-src]').length === 4")
        page.locator(".grid td a").first.click()
        page.wait_for_selector("#beside[open]")
        titles = "[...document.querySelectorAll('#left option')].map(one => one.text)"
        assert page.evaluate(titles) == ["without LoRA", "step 4", "step 6"]
        assert list_errors(page) == []
        assert page.problems == []
        assert shlex.join(jobs(folder)[0]).startswith("python tools/compare.py")


def test_the_focus_stays_near_a_run_that_is_left_out(served: Served) -> None:
    with open_page(f"{served.url}/compare?{form(served, (4,))}") as page:
        page.evaluate("document.querySelectorAll('[name=file]').forEach((box) => { box.checked = false; })")
        page.locator("input[name=run][type=checkbox]").focus()
        page.keyboard.press("Space")
        wait_until(page, "!document.querySelector('input[name=run][type=checkbox]')")
        wait_until(page, "document.activeElement.closest('form.compare') !== null")


def test_missing_ones_are_made_from_where_prompts_are_typed(served: Served, folder: Path) -> None:
    write_comparable(folder.parent / "y", "y", written_in=str(folder.parent / "y"))
    fields = find_form(show(served, (6,), "y"))
    assert fields.index('name="more"') < fields.index('id="make_them"')
    body = f"{form(served, (6,), 'y')}&{urlencode({'prompt': 'none of these'})}"
    refused = served.ask("/compare", "POST", body, Origin=served.url)
    assert (refused.status, "Tick a prompt, or type one" in refused.text) == (422, True)
    assert jobs(folder) == []
    with open_page(f"{served.url}/compare?{form(served, (6,), 'y')}") as page:
        page.get_by_label("Further prompts").fill("a hen --d 3")
        page.get_by_role("button", name="Make them").click()  # which takes what has just been typed
        page.get_by_text("job 1: waiting").first.wait_for()
        assert "a+hen" in page.url
        assert page.problems == []
    prompts = Path(jobs(folder)[0][jobs(folder)[0].index("--from_file") + 1])
    assert "a hen --d 3" in prompts.read_text(encoding="utf-8")


def find_form(text: str) -> str:
    """Return the HTML of the form in which files and prompts are chosen."""
    return text.partition('<form action="/compare"')[2].partition("</form>")[0]


def test_a_command_of_elsewhere_is_read_before_it_is_queued(served: Served) -> None:
    page = show(served, (6,), more="a hen")
    assert 'id="make_them"' not in page
    assert page.index("<details open>") < page.index("Make them")


@pytest.mark.parametrize(
    "start", ["python {}wan_generate_video.py", "python {}reelsmith.py --extensions a,b generate wan"]
)
def test_a_command_with_extensions_is_that_of_its_script(start: str) -> None:
    line = f"{start.format('/a/b/')} --dit d.safetensors"
    command = PageCommand("Generate with it", line, line, "")

    found = [*_read_commands([command], {"wan_generate_video", "krea2_generate_image"})]

    assert [(each.script, each.argv) for each in found] == [
        ("wan_generate_video", ["--dit", "d.safetensors"])
    ]
