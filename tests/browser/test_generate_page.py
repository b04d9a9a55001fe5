"""The page Generate: its form, dropped files, render jobs in Chromium, and what it refuses."""

import contextlib
import html
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from browser.jobs.jobs import WAITING, JobQueue
from browser.jobs.render_queue import ENDED_MEANWHILE
from browser.jobs.render_worker import RenderWorker
from browser.pages.generate.dropped_settings import read_dropped_settings
from browser.pages.generate.generate_pages import GenerateForm
from browser.pages.generate.lora_rows import RunLoras, check_family
from browser.runs import recipes
from browser.runs.recipes import make_model_recipe
from browser.runs.runs import FINISHED, RUNNING, STOPPED, Runs
from downloads.catalogue import model_sets
from modules.errors import OptionError
from modules.media.writing import write_png
from pocket.measure import POCKET
from protocols.families import with_scripts
from tests.browser.lasting import lasting  # noqa: F401  # a fixture
from tests.browser.serving import Answer, Served, python_of, serve_runs, write_run
from tests.browser.test_accessible import assert_fits, axe, list_errors  # noqa: F401  # a fixture
from tests.browser.test_render_worker import start_fake
from tests.chromium import open_page, wait_until
from tests.commands import QUIET, ROOT
from tests.waiting import PATIENCE, wait_for
from training.reports.history import History, history_path

IMAGE = np.full((32, 48, 3), 90, np.uint8)
PROMPT = 'a <b>cat</b> & "dog" ü --w 9'


def write_generating(
    folder: Path,
    name: str = "x",
    trained_on: str = "wan",
    script: str = "wan_generate_video.py",
    task: str = "--task t2v-1.3B ",
) -> None:
    """Write a run of the pocket model with two LoRA files, the lowest loss at step 4."""
    write_run(folder, name)
    history = History(history_path(folder, name), 1, 6)
    for step, loss in ((2, 0.3), (4, 0.2)):
        file = folder / f"{name}-step{step}.safetensors"
        save_file({"x": torch.full((1,), float(step))}, file, {"ss_base_model_version": trained_on})
        history.add(step, saved=file.name)
        history.add(step, validation={"validation/loss": loss})
    models = " ".join(f"--{part} '{POCKET / part}.safetensors'" for part in ("dit", "vae", "t5"))
    command = f"python {script} {task}{models} --flow_shift 3.0 "
    command += f"--lora_weight '{folder}/{name}-step4.safetensors' --lora_multiplier 0.8 "
    command += "--prompt 'a square' --video_size 48 64 --video_length 5 --infer_steps 2 --guidance_scale 5.0 "
    command += "--seed 5 --save_path out"
    history.add(6, commands=[["Generate with it", command, command, ""]])
    history.flush()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a run, beside which lies a picture that no page may read."""
    write_generating(tmp_path / "roots" / "out")
    write_png(tmp_path / "secret.png", IMAGE)
    return tmp_path / "roots"


@contextlib.contextmanager
def serve(root: Path, **options: Any) -> Iterator[Served]:
    """Serve the page with a process that only seems to make pictures."""
    queue = JobQueue(root / "reelsmith-queue", bool(options.get("read_only")))
    worker = RenderWorker(queue, start_fake)
    try:
        with serve_runs(root, queue=queue, render_worker=worker, **options) as served:
            yield served
    finally:
        worker.close()


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve(root) as served:
        yield served


def run_id(served: Served, name: str = "x") -> str:
    return served.of(name).split("/")[2]


def fields_of(served: Served, **changes: str) -> dict[str, str]:
    """What the form sends for the run."""
    fields = {"source": f"run {run_id(served)}", "prompt": "a cat", "width": "64", "height": "48"}
    return {**fields, "frames": "5", "steps": "2", "seed": "7", "count": "1", **changes}


def post(served: Served, what: str, fields: Mapping[str, object]) -> Answer:
    body = urlencode(fields, doseq=True)
    return served.ask(f"/generate/{what}", "POST", body, Origin=served.url)


def send(served: Served, what: str, path: Path, name: str = "") -> Answer:
    """Send a file as the page does."""
    import http.client

    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    with contextlib.closing(link):
        address = f"/generate/{what}?name={quote(name or path.name)}"
        link.request("POST", address, path.read_bytes(), {"Origin": served.url})
        answer = link.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())


def requests(root: Path) -> list[dict[str, Any]]:
    files = (root / "reelsmith-queue" / "making").glob("[0-9]*.json")
    return [json.loads(path.read_text()) for path in sorted(files, key=lambda path: int(path.stem))]


def states(root: Path) -> list[str]:
    return [request["state"] for request in requests(root)]


def message(answer: Answer) -> str:
    text = answer.text.split('id="said"')[1].split(">", 1)[1].split("</p>")[0]
    return re.sub("<!--.*?-->", "", text)


# --- the form


def test_a_run_fills_the_form_with_its_own_command(served: Served) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        values = {name: page.get_by_label(name).input_value() for name in ("Prompt", "Width", "Height")}
        assert values == {"Prompt": "a square", "Width": "64", "Height": "48"}
        for name, value in {
            "Frames": "5",
            "Steps": "2",
            "Guidance": "5.0",
            "Seed": "",
            "How many": "1",
        }.items():
            assert page.get_by_label(name).input_value() == value
        assert page.get_by_label("use x-step4.safetensors").is_checked()
        assert not page.get_by_label("use x-step2.safetensors").is_checked()
        assert page.get_by_label("strength of x-step4.safetensors").input_value() == "0.8"
        rows = page.locator(".loras li").all_text_contents()
        assert ["best loss" in row for row in rows] == ["x-step4" in row for row in rows]
        command = page.locator("#command").text_content()
        assert "--lora_multiplier 0.8" in command
        assert "--video_size 48 64" in command
        assert page.problems == []


def test_the_command_follows_what_is_typed_and_a_reload_keeps_it(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Seed").fill("7")
        page.get_by_label("How many").fill("3")
        page.get_by_text("Add a LoRA").click()
        page.get_by_label("use x-step2.safetensors").check()
        page.get_by_label("strength of x-step2.safetensors").fill("0.35")
        wait_until(page, "document.querySelector('#command').textContent.includes('0.8 0.35')")
        command = page.locator("#command").text_content()
        assert "--prompt 'a <b>cat</b> & \"dog\" ü --w 9'" in command
        assert command.endswith("--num_videos 3")
        assert page.get_by_label("Lock").is_checked()
        wait_until(page, "location.search.startsWith('?draft=')")
        page.reload()
        assert page.get_by_label("Prompt").input_value() == PROMPT
        assert page.get_by_label("strength of x-step2.safetensors").input_value() == "0.35"
        assert page.locator("#command").text_content() == command
        assert page.problems == []
        with serve(root) as again:  # the newest draft, after a restart
            page.goto(f"{again.url}/generate")
            assert page.get_by_label("Prompt").input_value() == PROMPT
            assert page.get_by_label("How many").input_value() == "3"


def test_two_pages_keep_forms_of_their_own(served: Served) -> None:
    address = f"{served.url}/generate?run={run_id(served)}"
    with open_page(address) as page, contextlib.closing(page.context.browser.new_page()) as other:
        other.goto(address)
        for each, prompt in ((page, "of the first"), (other, "of the second")):
            each.get_by_label("Prompt").fill(prompt)
            wait_until(each, "location.search.startsWith('?draft=')")
        page.reload()
        other.reload()
        assert page.get_by_label("Prompt").input_value() == "of the first"
        assert other.get_by_label("Prompt").input_value() == "of the second"


def test_a_last_file_and_its_step_file_are_one_row(served: Served, root: Path) -> None:
    for name in ("x", "x-step4"):
        path = root / "out" / f"{name}.safetensors"
        save_file({"x": torch.full((1,), 4.0)}, path, {"sshs_model_hash": "4" * 64})
    with history_path(root / "out", "x").open("a", encoding="utf-8") as history:
        history.write('{"step": 4, "saved": "x.safetensors"}\n')
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        names = [text.split()[1] for text in page.locator(".loras li").all_text_contents()]
        assert names == ["x-step4.safetensors", "x-step2.safetensors"]
        assert page.get_by_label("use x-step4.safetensors").is_checked()
        assert "step 4 · loss 0.2" in page.locator(".loras li").first.inner_text()
        assert f"--lora_weight {root}/out/x-step4.safetensors" in page.locator("#command").text_content()


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        ("", {"x-step4.safetensors", "x-step2.safetensors", "x.safetensors"}),
        ("--lllite_weights out/x-step4.safetensors", set()),  # of a control network
        ("--dit=out/x.safetensors", set()),  # of a whole model
        (
            "--lora_weight out/x-step4.safetensors --words out/x-step2.safetensors",
            {"x-step4.safetensors", "x.safetensors"},
        ),
    ],
)
def test_only_files_that_a_run_takes_as_loras_are_offered(
    options: str, offered: set[str], tmp_path: Path
) -> None:
    write_generating(tmp_path / "out")
    command = f"python wan_generate_video.py {options} --prompt 'a square'"
    history = History(history_path(tmp_path / "out", "x"), 1, 6)
    history.add(6, commands=[["Generate with it", command, command, ""]])
    history.flush()
    loras = RunLoras(Runs((tmp_path,)))

    ((run, _),) = loras.refresh()

    assert loras.find_run_family(run.id) == "wan"
    assert loras.find_run_file_names(run.id) == offered


def test_loras_of_other_models_stand_behind_a_word_with_the_reason(root: Path) -> None:
    write_generating(root / "large", "large", task="--task t2v-14B ")
    write_generating(root / "flat", "flat", script="flux_2_generate_image.py", task="")
    with serve(root) as served, open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        chosen, first, second = page.locator(".loras").all()
        assert all(
            "use x" in text for text in (chosen.locator("li").or_(first.locator("li"))).all_text_contents()
        )
        assert not second.is_visible()
        page.get_by_text("LoRAs of other models").click()
        texts = second.locator("li").all_text_contents()
        assert ["trained for t2v-14B, not t2v-1.3B" in text for text in texts] == [True] * 3 + [False] * 3
        assert ["of FLUX.2, not Wan" in text for text in texts] == [False] * 3 + [True] * 3
        assert second.get_by_role("checkbox").count() == 3
        page.get_by_label("use large-step4.safetensors").check()
        wait_until(page, "document.querySelector('#command').textContent.includes('large-step4')")
        wait_until(page, "location.search.startsWith('?draft=')")
        page.reload()
        assert page.locator(".loras").first.get_by_text("large-step4").is_visible()
        assert page.problems == []


def test_shape_slider_and_lock_set_what_they_say(served: Served) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_role("group", name="Shape").get_by_role("button", name="48 × 64").click()
        assert page.get_by_label("Width").input_value() == "48"
        assert page.get_by_label("Height").input_value() == "64"
        page.get_by_text("Add a LoRA").click()
        page.get_by_label("use x-step2.safetensors").check()
        page.get_by_label("slider of x-step2.safetensors").fill("1.5")
        assert page.get_by_label("strength of x-step2.safetensors").input_value() == "1.5"
        page.get_by_label("Lock").check()
        seed = page.get_by_label("Seed").input_value()
        assert seed.isdecimal()
        wait_until(page, f"document.querySelector('#command').textContent.includes('--seed {seed}')")
        page.get_by_label("Lock").uncheck()
        assert page.get_by_label("Seed").input_value() == ""


def test_another_model_keeps_the_texts_and_brings_its_fields(served: Served) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Prompt").fill("a cat that stays")
        page.get_by_label("Model").select_option("model framepack i2v")
        page.get_by_label("Seconds").wait_for()
        assert page.get_by_label("Prompt").input_value() == "a cat that stays"
        assert page.get_by_label("Width").input_value() == "640"
        assert page.get_by_label("Start from").count() == 1
        assert page.get_by_label("End with").count() == 1
        assert "of its files are not on this machine yet, such as " in page.locator("#fields").inner_text()
        assert page.locator("#fields a").get_attribute("href") == "/models"


@pytest.mark.parametrize("text", ["a cat on a mat, " * 1250, "猫が好き" * 5000])
def test_a_prompt_of_20000_characters_is_made_and_kept(served: Served, root: Path, text: str) -> None:
    draft = "0123456789abcdef"
    fields = fields_of(served, prompt=text, negative=text, draft=draft)

    answer = post(served, "make", fields)

    assert (answer.status, message(answer)) == (200, "")
    wait_for(lambda: states(root) == [FINISHED], lambda: str(states(root)))
    assert [request["request"]["prompt"] for request in requests(root)] == [text.strip()]
    assert text.strip() in served.ask(f"/generate?draft={draft}").text
    with open_page(f"{served.url}/generate?draft={draft}", width=360) as page:
        assert page.get_by_label("Prompt").input_value() == text
        assert_fits(page)
        assert page.problems == []


def test_a_longer_prompt_is_refused_by_its_label(served: Served, root: Path) -> None:
    for name, label in {"prompt": "Prompt", "negative": "Negative"}.items():
        answer = post(served, "make", fields_of(served, **{name: "ü" * 30_001}))
        assert answer.status == 422
        assert message(answer).startswith(f"{label} has 30,001 characters: at most 30,000 are accepted")
    assert states(root) == []


def test_a_double_click_makes_one(served: Served) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Prompt").fill("a cat")
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        with page.expect_response("**/generate/make"):
            page.get_by_role("button", name="Make", exact=True).dblclick()
        page.wait_for_timeout(1000)  # for a second one, if there were one
        assert sent.count(f"{served.url}/generate/make") == 1


def test_no_label_holds_another_one(served: Served) -> None:
    """A person and a test find fields by their labels."""
    for source in (
        f"run {run_id(served)}",
        "model framepack i2v",
        "model wan22 t2v-A14B",
        "model vace vace-1.3B",
    ):
        with open_page(f"{served.url}/generate?{urlencode({'source': source})}") as page:
            labels = page.locator("#page label").all_text_contents()
            named = page.locator("#page :is(input, select, textarea, pre)[aria-label]")
            labels += [one.get_attribute("aria-label") for one in named.all()]
            words = [" ".join(label.lower().split()) for label in labels]
            assert len(words) > 8
            for word in words:
                assert [other for other in words if word in other] == [word]


# --- render jobs


def test_make_makes_what_the_form_says(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Seed").fill("7")
        page.get_by_label("How many").fill("2")
        page.get_by_role("button", name="Make", exact=True).click()
        wait_for(lambda: states(root) == [FINISHED] * 2, lambda: page.locator("#said").inner_text())
        assert [request["request"]["options"]["seed"] for request in requests(root)] == ["7", "8"]
        assert requests(root)[0]["request"]["prompt"] == PROMPT
        assert requests(root)[0]["request"]["strengths"] == {"": ["0.8"]}
        assert "--seed" in requests(root)[0]["command"]
        wait_until(page, "document.querySelector('#work').textContent.includes('x stays loaded')")
        assert page.get_by_label("Prompt").input_value() == PROMPT
        page.get_by_role("button", name="Free the card").click()
        wait_until(page, "!document.querySelector('#work').textContent.includes('stays loaded')")
        assert page.problems == []


def format_command_line(page: Any) -> list[str]:
    return shlex.split(page.locator("#command").text_content())


def test_the_command_is_that_of_the_model_that_was_chosen_last(served: Served) -> None:
    sides = {"krea2 turbo": "1024", "stable_diffusion xl": "1024", "wan t2v-1.3B": "832"}
    with open_page(f"{served.url}/generate") as page:
        page.get_by_label("Prompt").fill(PROMPT)
        for model in ("wan22 t2v-A14B-4steps", *sides):
            page.get_by_label("Model").select_option(f"model {model}")
            wait_until(
                page, f"document.querySelector('#make [name=width]').value === '{sides.get(model, '832')}'"
            )
            page.wait_for_timeout(800)  # longer than the page waits before it asks
            command = format_command_line(page)
            width, height = (
                page.get_by_label(name, exact=True).input_value() for name in ("Width", "Height")
            )
            flag = "--video_size" if model.startswith("wan") else "--image_size"
            assert command[command.index(flag) + 1 :][:2] == [height, width]
            steps = page.get_by_label("Steps", exact=True).input_value()
            spelled = "--infer_steps" if model.startswith("wan") else "--steps"
            assert (spelled in command) == bool(steps)
            if steps:
                assert command[command.index(spelled) + 1] == steps
        assert page.problems == []


def place_of(page: Any, selector: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an element in the window."""
    box = page.locator(selector).first.bounding_box()
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def test_form_button_and_what_is_made_are_in_view_together(served: Served, root: Path) -> None:
    for number in range(9):
        write_png(root / "generated" / f"20261126-10101{number}_{number}.png", IMAGE)
    with open_page(f"{served.url}/generate?run={run_id(served)}", width=1440, height=900) as page:
        page.get_by_label("Prompt").fill("slow")
        page.locator("#shelf .plate").first.wait_for()
        page.get_by_role("button", name="Make", exact=True).click()
        page.get_by_text(re.compile(r"In progress: 1 result, seed \d+\.")).wait_for()
        page.locator(".preview img").wait_for()
        for shown in (".preview", "#shelf .plate .picture"):
            form, made = place_of(page, "#make"), place_of(page, shown)
            assert form[2] < made[0]
            if shown == "#shelf .plate .picture":
                page.get_by_role("button", name="Cancel").click()
                page.locator("#ended").wait_for()
                assert place_of(page, "#ended")[3] - place_of(page, "#ended")[1] < 60  # in one line
                made = place_of(page, shown)
            assert made[3] <= 900
        for top in (0, 400):
            page.evaluate(f"scrollTo(0, {top})")
            wait_until(page, f"scrollY === {top}")
            page.wait_for_timeout(100)
            assert 0 <= place_of(page, "#press")[1] < place_of(page, "#press")[3] <= 900
        page.get_by_label("Steps").fill("3")
        assert page.locator("#on_its_way").text_content() == ""
        page.set_viewport_size({"width": 390, "height": 844})
        assert place_of(page, "#press")[3] <= 844
        assert page.problems == []


def test_chosen_loras_are_a_list_and_others_are_added_by_a_search(served: Served, root: Path) -> None:
    write_generating(root / "more", "style")
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        chosen, others = page.locator("#chosen_loras li"), page.locator("#add_lora li:visible")
        assert [row.split()[1] for row in chosen.all_inner_texts()] == ["x-step4.safetensors"]
        page.get_by_text("Add a LoRA").click()
        assert others.count() == 5
        page.get_by_label("Look for one").fill("STYLE step2")
        page.get_by_label("use style-step2.safetensors").check()
        assert chosen.count() == 2
        assert page.evaluate("document.activeElement.value").endswith("style-step2.safetensors")
        wait_until(page, "document.querySelector('#command').textContent.includes('style-step2')")
        page.get_by_label("use x-step4.safetensors").uncheck()
        wait_until(page, "!document.querySelector('#command').textContent.includes('x-step4')")
        assert chosen.count() == 1
        assert page.problems == []


def test_a_run_of_stable_diffusion_fills_the_form_like_others(root: Path) -> None:
    write_generating(root / "xl", "xl", trained_on="sdxl", script="sdxl_generate_image.py", task="")
    with serve(root) as served, open_page(f"{served.url}/generate?run={run_id(served, 'xl')}") as page:
        assert page.get_by_label("Model").input_value() == f"run {run_id(served, 'xl')}"
        assert page.get_by_label("use xl-step4.safetensors").is_checked()
        assert python_of("sdxl_generate_image.py") in page.locator("#command").text_content()
        assert page.get_by_role("button", name="Make", exact=True).is_visible()


def test_four_seeds_follow_one_another(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_role("button", name="Make with four seeds").click()
        wait_for(lambda: states(root) == [FINISHED] * 4)
        seeds = [int(request["request"]["options"]["seed"]) for request in requests(root)]
        assert seeds == [*range(seeds[0], seeds[0] + 4)]


def test_a_render_job_is_watched_cancelled_and_made_again(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Prompt").fill("slow")
        page.get_by_role("button", name="Make", exact=True).click()
        wait_until(page, "/making it · step [0-9]+ of 3/.test(document.querySelector('#work').textContent)")
        wait_until(page, "document.querySelector('.preview img') !== null")
        address = page.locator(".preview img").get_attribute("src")
        assert served.ask(address).body == b"a preview"
        page.get_by_role("button", name="Cancel").click()
        wait_for(lambda: states(root) == [STOPPED])
        page.locator("#ended > summary").click()
        page.get_by_role("button", name="Again", exact=True).click()
        wait_for(lambda: states(root) == [RUNNING])
        page.get_by_role("button", name="Cancel").click()
        wait_for(lambda: states(root) == [STOPPED])
        page.locator("#ended > summary").click()
        page.get_by_role("button", name="Forget all of these").click()
        wait_for(lambda: states(root) == [])
        assert served.ask(address).status == 204


def test_a_fault_is_shown_and_the_form_stays(served: Served, root: Path) -> None:
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        page.get_by_label("Steps").fill("many")
        page.get_by_role("button", name="Make", exact=True).click()
        wait_until(page, "document.querySelector('#said').textContent !== ''")
        assert "Steps: 'many' is not a whole number" in page.locator("#said").inner_text()
        page.wait_for_timeout(1500)  # the next poll leaves it
        assert "Steps: 'many'" in page.locator("#said").inner_text()
        assert page.get_by_label("Steps").input_value() == "many"
        assert states(root) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "Prompt: describe what to generate."),
        ({"prompt": "a\0b"}, "Prompt: omit the character NUL"),
        ({"negative": "a\0b"}, "Negative: omit the character NUL"),
        ({"seed": "x"}, "Seed x: use a whole number"),
        ({"seed": "9" * 30}, "use a whole number"),
        ({"count": "0"}, "How many 0: use a number from 1 to 64."),
        ({"count": "65"}, "How many 65"),
        ({"count": "1e2"}, "How many 1e2"),
        ({"source": "run 0123456789abcdef"}, "its history has no command that this page can run"),
        ({"source": "model no such"}, "this model is not here"),
        ({"source": "model stable_diffusion 1.5-guided"}, "this model is not here"),
        ({"source": "model flux dev"}, "is missing: download the model first"),
        ({"lora": "/etc/passwd"}, "/etc/passwd: this LoRA does not exist"),
        ({"redraw": "../secret.png"}, "Redraw ../secret.png: there is no such file."),
    ],
)
def test_render_jobs_that_cannot_be_made_are_refused(
    served: Served, root: Path, changes: dict[str, str], words: str
) -> None:
    answer = post(served, "make", fields_of(served, **changes))
    assert answer.status == 422
    assert words in message(answer)
    assert states(root) == []


def test_what_the_script_refuses_is_refused_with_its_words(served: Served, root: Path) -> None:
    (root / "a.png").write_bytes(b"")
    path = str(root / "a.png")
    answer = post(served, "make", fields_of(served, redraw=path, share="0.5", prompt=path[:-4] + ".txt"))
    assert answer.status == 200  # a text like the name of a file that is not there
    (root / "a.txt").write_text("a dog")
    answer = post(served, "make", fields_of(served, prompt=str(root / "a.txt")))
    assert answer.status == 422
    assert "is a file. For the prompts in it, pass --from_file" in message(answer)


def test_no_picture_outside_the_folders_is_read(served: Served, root: Path) -> None:
    secret = root.parent / "secret.png"
    link = root / "link.png"
    link.symlink_to(secret)
    for path in (secret, link, root / ".." / "secret.png"):
        answer = post(served, "make", fields_of(served, redraw=str(path)))
        assert answer.status == 422
        assert "is outside the folders that this page shows" in message(answer)


def test_a_lora_of_another_family_is_refused_by_its_header(root: Path) -> None:
    write_generating(root / "other", "y", trained_on="flux")
    with serve(root) as served:
        path = str(root / "other" / "y-step2.safetensors")
        answer = post(served, "make", fields_of(served, lora=path, **{f"strength {path}": "1"}))
        assert answer.status == 422
        assert "y-step2.safetensors is a LoRA of FLUX.1, not of Wan." in message(answer)


# what a training writes into `ss_base_model_version` where that is not the name of the family
WRITTEN_VERSIONS = {
    "flux": ("flux1", "chroma"),
    "flux_kontext": ("flux_kontext", "flux1"),
    "sd1": ("sd_v1", "sd_v2"),
    "sdxl": ("sdxl_base_v1-0",),
    "lumina": ("lumina2",),
}


def write_own_run(root: Path, family: str, trained_on: str, models: Path) -> str:
    """Write a run of a family with a LoRA, and files that stand for its model; return the form's source."""
    script = f"{with_scripts()[family].generation_script}.py"
    model = next(one for one in model_sets() if script in one.commands.get("generate", "").split())
    for part in model.components:
        (models / part.path).parent.mkdir(parents=True, exist_ok=True)
        (models / part.path).write_bytes(b"")
    write_generating(root / "own", "own", trained_on=trained_on, script=script, task="")
    return f"model {model.family} {model.task}"


@pytest.mark.parametrize("family", with_scripts())
def test_each_family_takes_its_own_loras_and_no_others(family: str, tmp_path: Path) -> None:
    for version in WRITTEN_VERSIONS.get(family, (family,)):
        save_file({"x": torch.zeros(1)}, tmp_path / "own.safetensors", {"ss_base_model_version": version})
        check_family(tmp_path / "own.safetensors", family)
    foreign = "wan" if family != "wan" else "lumina2"
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"ss_base_model_version": foreign})
    with pytest.raises(OptionError, match=r"foreign\.safetensors is a LoRA of .*, not of "):
        check_family(tmp_path / "foreign.safetensors", family)


@pytest.mark.parametrize(("family", "foreign"), [("sdxl", "sd_v1"), ("sd1", "sdxl_base_v1-0")])
def test_variants_of_stable_diffusion_do_not_take_each_others_loras(
    family: str, foreign: str, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"ss_base_model_version": foreign})
    with pytest.raises(OptionError, match=r"x\.safetensors is a LoRA of "):
        check_family(tmp_path / "x.safetensors", family)


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("sdxl", "flux_kontext") else pytest.param(name, marks=pytest.mark.slow)
        for name in with_scripts()
    ],
)
def test_make_takes_the_lora_of_each_family(family: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    version = WRITTEN_VERSIONS.get(family, (family,))[0]
    source = write_own_run(tmp_path / "roots", family, version, models)
    image = tmp_path / "roots" / "start.png"
    write_png(image, IMAGE)
    with serve(tmp_path / "roots", models=models) as served:
        page = served.ask(f"/generate?source={quote(source)}").text
        (path,) = re.findall(r'name="lora" value="([^"]*own-step2\.safetensors)"', page)
        fields = {"source": source, "prompt": "a cat", "lora": html.unescape(path), f"strength {path}": "0.9"}
        for name in ("start", "references", "control"):
            if f'name="{name}"' in page:
                fields[name] = str(image)
        answer = post(served, "make", fields)
        assert message(answer) == ""
        assert answer.status == 200
        (made,) = requests(tmp_path / "roots")
        assert str(tmp_path / "roots" / "own" / "own-step2.safetensors") in made["session"]


def test_a_lora_from_elsewhere_is_used_by_its_path(served: Served, root: Path) -> None:
    path = root / "loras" / "style.safetensors"
    path.parent.mkdir()
    save_file({"x": torch.zeros(1)}, path, {"ss_base_model_version": "wan"})
    form = post(served, "form", fields_of(served)).text
    assert f'<option value="{path}">style.safetensors</option>' in form
    fields = fields_of(served, lora_file=f'"{path}"', lora_strength="0.6")
    answer = post(served, "make", fields)
    assert (answer.status, message(answer)) == (200, "")
    (made,) = requests(root)
    assert str(path) in made["session"]
    assert made["request"]["strengths"][""][-1] == "0.6"
    outside = root.parent / "x.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    for wrong, words in (
        (str(outside), "is outside the folders that this page shows"),
        (str(root / "x.ckpt"), "choose a file that ends in .safetensors"),
        (str(root / "none.safetensors"), "no longer exists"),
    ):
        refused = post(served, "make", fields_of(served, lora_file=wrong))
        assert (refused.status, words in message(refused)) == (422, True), message(refused)


def test_the_negative_prompt_of_one_model_does_not_stay_for_another(served: Served) -> None:
    fields = {"source": "model anima base", "fill": "yes", "draft": "0123456789abcdef"}
    anima = post(served, "form", fields).text
    negative = re.search(r'<textarea name="negative"[^>]*>([^<]*)<', anima)
    assert negative is not None
    assert negative[1]
    other = {**fields, "source": "model stable_diffusion 1.5", "negative": html.unescape(negative[1])}
    other["filled_from"] = fields["source"]
    assert html.unescape(negative[1]) not in html.unescape(post(served, "form", other).text)
    typed = post(served, "form", {**other, "negative": "hands"}).text
    assert ">hands</textarea>" in typed


def test_the_prompt_of_one_run_does_not_stay_for_another(served: Served, root: Path) -> None:
    write_generating(root / "other", "other")
    history = history_path(root / "other", "other")
    history.write_text(history.read_text("utf-8").replace("a square", "a circle"), "utf-8")
    with open_page(f"{served.url}/generate?run={run_id(served)}") as page:
        prompt = page.get_by_label("Prompt")
        assert prompt.input_value() == "a square"
        page.get_by_label("Model").select_option(f"run {run_id(served, 'other')}")
        wait_until(page, "document.querySelector('#prompt').value === 'a circle'")
        prompt.fill("a triangle")
        page.get_by_label("Model").select_option(f"run {run_id(served)}")
        shown = page.locator("#source").input_value()
        page.locator(f"#make [name=filled_from][value='{shown}']").wait_for(state="attached")
        assert prompt.input_value() == "a triangle"


def test_an_edit_without_an_image_is_refused_before_the_queue(root: Path) -> None:
    write_generating(root / "edits", "edits", "kontext", "flux_kontext_generate_image.py", task="")
    with serve(root) as served:
        fields = {"source": f"run {run_id(served, 'edits')}", "prompt": "it wears a hat", "count": "1"}
        refused = post(served, "make", fields)
        assert (refused.status, message(refused)) == (
            422,
            "Edit: this model needs one. Drop it on the field.",
        )
        assert requests(root) == []


def test_without_a_card_models_compute_in_32_bits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = [one for one in model_sets() if (one.family, one.task) == ("stable_diffusion", "xl")]
    for memory, has_flag in ((0.0, False), (24.0, True)):
        monkeypatch.setattr(recipes, "find_memory", lambda memory=memory: memory)
        assert ("--fp16" in make_model_recipe(model, Path("models"), Path()).fixed_options) is has_flag


def test_a_file_that_is_gone_is_said(served: Served, root: Path) -> None:
    path = root / "out" / "x-step4.safetensors"
    post(served, "form", fields_of(served))  # the list of LoRAs is read
    path.unlink()
    answer = post(served, "make", fields_of(served, lora=str(path), **{f"strength {path}": "1"}))
    assert answer.status == 422
    assert "no longer exists" in message(answer)


def test_numbers_of_render_jobs_that_are_not_there_are_refused(served: Served) -> None:
    for what in ("cancel", "again", "remove"):
        assert post(served, what, {"id": "99"}).status == 422
        assert post(served, what, {"id": "../1"}).status == 404
    assert post(served, "other", {}).status == 404


# --- dropped files


def test_a_chosen_picture_is_copied_below_the_root(served: Served, root: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "my cat; rm -rf.png", IMAGE)
    with open_page(f"{served.url}/generate?source=model+framepack+i2v") as page:
        page.get_by_label("file of the first image").set_input_files(tmp_path / "my cat; rm -rf.png")
        wait_until(page, "document.querySelector('#start').value !== ''")
        path = Path(page.get_by_label("Start from").input_value())
        assert path.parent == root / "generated" / "inputs"
        assert path.name.startswith("my-cat-rm-rf-")
        assert path.read_bytes() == (tmp_path / "my cat; rm -rf.png").read_bytes()
        wait_until(page, "document.querySelector('#command').textContent.includes('my-cat-rm-rf-')")


def drop(page: Any, selector: str, path: Path) -> None:
    """Drop a file on a place of the page."""
    data = list(path.read_bytes())
    transfer = page.evaluate_handle(
        "([bytes, name]) => { const all = new DataTransfer(); "
        "all.items.add(new File([new Uint8Array(bytes)], name)); return all; }",
        [data, path.name],
    )
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def test_a_result_dropped_on_the_page_fills_the_form(served: Served, tmp_path: Path) -> None:
    tags = {
        "bt_prompt": PROMPT,
        "bt_seeds": "123",
        "bt_width": "96",
        "bt_height": "80",
        "bt_infer_steps": "9",
    }
    tags |= {"bt_model_type": "wan", "bt_task": "t2v-1.3B", "bt_guidance_scale": "4.5"}
    tags |= {"bt_lora_0": "x-step2.safetensors: 0.6", "bt_negative_prompt": "N/A"}
    write_png(tmp_path / "made.png", IMAGE, tags)
    with open_page(f"{served.url}/generate?source=model+flux+dev") as page:
        drop(page, "h1", tmp_path / "made.png")
        page.wait_for_url("**/generate?draft=*")
        assert page.get_by_label("Model").input_value() == f"run {run_id(served)}"
        for name, value in {"Prompt": PROMPT, "Seed": "123", "Width": "96", "Steps": "9"}.items():
            assert page.get_by_label(name).input_value() == value
        assert page.get_by_label("Negative").input_value() == ""
        assert page.get_by_label("use x-step2.safetensors").is_checked()
        assert page.get_by_label("strength of x-step2.safetensors").input_value() == "0.6"
        assert not page.get_by_label("use x-step4.safetensors").is_checked()
        note = "Filled with the settings of a file made by Reelsmith."
        assert note == page.locator(".status").first.inner_text()
        page.get_by_label("Steps").fill("8")
        wait_until(page, "document.querySelector('#command').textContent.includes('--infer_steps 8')")
        page.reload()
        assert note not in page.locator("body").inner_text()
        write_png(tmp_path / "plain.png", IMAGE)
        drop(page, "h1", tmp_path / "plain.png")
        wait_until(page, "document.querySelector('#said').textContent.includes('It contains no settings')")
        assert page.get_by_label("Prompt").input_value() == PROMPT


def test_what_a_dropped_file_needs_and_is_not_here_is_said(served: Served, tmp_path: Path) -> None:
    tags = {"bt_prompt": "a", "bt_seeds": "1", "bt_model_type": "wan", "bt_task": "t2v-1.3B"}
    write_png(
        tmp_path / "a.png", IMAGE, {**tags, "bt_lora_0": "gone.safetensors: 1.0", "bt_i2i_path": "b.png"}
    )
    page = served.ask(send(served, "settings", tmp_path / "a.png").json()["address"]).text
    assert "Its LoRA gone.safetensors is not here. It started from b.png: drop that" in page
    write_png(tmp_path / "b.png", IMAGE, {**tags, "bt_model_type": "no such"})
    page = served.ask(send(served, "settings", tmp_path / "b.png").json()["address"]).text
    assert "Its model is unknown: choose one." in page
    write_png(tmp_path / "c.png", IMAGE, {**tags, "bt_task": "t2v-99B"})
    page = served.ask(send(served, "settings", tmp_path / "c.png").json()["address"]).text
    assert "Its model, wan t2v-99B, is not among the models here: choose one." in page


def test_a_result_is_dragged_onto_a_field(served: Served, root: Path) -> None:
    (root / "generated").mkdir()
    write_png(root / "generated" / "made.png", IMAGE)
    with open_page(f"{served.url}/generate?source=model+framepack+i2v") as page:
        page.locator("#results").scroll_into_view_if_needed()
        address = page.locator(".plate a").get_attribute("href")
        transfer = page.evaluate_handle(
            "(text) => { const all = new DataTransfer(); all.setData('text/uri-list', text); return all; }",
            f"{served.url}{address}",
        )
        page.dispatch_event("[data-drop=start]", "drop", {"dataTransfer": transfer})
        wait_until(page, "document.querySelector('#start').value !== ''")
        path = Path(page.get_by_label("Start from").input_value())
        assert path.read_bytes() == (root / "generated" / "made.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"not an image", "not a readable image or clip"),
        ("a.html", b"<script>alert(1)</script>", "not a readable image or clip"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image or clip"),
        ("a.mp4", b"#EXTM3U\nfile:///etc/passwd\n", "not a readable image or clip"),
        ("a.png", b"", "It is empty"),
    ],
)
def test_files_are_judged_by_their_content(
    served: Served, root: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    answer = send(served, "file", tmp_path / name)
    assert answer.status == 422
    assert message in answer.json()["said"]
    assert [*(root / "generated" / "inputs").iterdir()] == []


def test_a_picture_has_the_suffix_of_its_content_and_no_path_of_its_name(
    served: Served, root: Path, tmp_path: Path
) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "x", "JPEG")
    first = send(served, "file", tmp_path / "x", "../../.ssh/authorized_keys.png").json()["path"]
    second = send(served, "file", tmp_path / "x", "..\\..\\.ssh\\authorized_keys.png").json()["path"]
    assert first == second
    assert Path(first).parent == root / "generated" / "inputs"
    assert Path(first).name.startswith("authorized_keys-")
    assert Path(first).suffix == ".jpg"
    shown = served.ask(f"/generate/input/{Path(first).name}")
    assert (shown.status, shown.headers["content-type"]) == (200, "image/jpeg")
    for name in ("..%2f..%2f..%2fsecret.png", "gone.png", "%2e%2e"):
        assert served.ask(f"/generate/input/{name}").status == 404


def test_a_file_that_is_too_large_is_refused(
    served: Served, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("browser.pages.generate.dropped_files.MAX_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(b"0" * 2000)
    answer = send(served, "file", tmp_path / "a.png")
    assert answer.status == 422
    assert "It has more than" in answer.json()["said"]
    assert [*(root / "generated" / "inputs").iterdir()] == []


GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5,
            "steps": 20,
            "cfg": 7.5,
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 640, "height": 512, "batch_size": 1}},
    "6": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["8", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
}
EXPECTED = {"prompt": "a cat", "negative_prompt": "blurry", "seed": "5", "infer_steps": "20"}
EXPECTED |= {"guidance_scale": "7.5", "video_size_width": "640", "video_size_height": "512"}


def test_prompts_of_other_programs_are_read_where_they_are_plain() -> None:
    found = read_dropped_settings({"prompt": json.dumps(GRAPH), "workflow": "{}"})
    assert (found.program, dict(found.options)) == ("ComfyUI", EXPECTED)
    found = read_dropped_settings(
        {"comment": json.dumps({"prompt": json.dumps(GRAPH), "workflow": {}})}
    )  # of a clip
    assert found.options["prompt"] == "a cat"
    text = "a cat,\nsitting\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, "
    text += 'Size: 640x512, Model: "a, b"'
    found = read_dropped_settings({"parameters": text})
    assert dict(found.options) == EXPECTED | {"prompt": "a cat,\nsitting"}


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"prompt": "a text that is not a graph"},
        {"prompt": json.dumps({"1": {"class_type": "Other", "inputs": {}}})},
        {"prompt": json.dumps({"1": {"class_type": "K", "inputs": {"positive": ["1", 0]}}})},
        {"prompt": json.dumps({"1": {"class_type": "K", "inputs": {"positive": [{}]}}})},
        {"prompt": "[" * 100_000},
        {"parameters": "no settings"},
    ],
)
def test_files_without_plain_settings_say_so(tags: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="It contains"):
        read_dropped_settings(tags)


def test_a_picture_of_comfyui_fills_the_form(served: Served, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    Image.fromarray(IMAGE).save(tmp_path / "comfy.png", pnginfo=info)
    address = send(served, "settings", tmp_path / "comfy.png").json()["address"]
    page = served.ask(address).text
    for text in ('value="640"', 'value="512"', ">a cat</textarea>", ">blurry</textarea>", 'value="5"'):
        assert text in page


# --- safety


def test_nothing_is_written_with_read_only(root: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", IMAGE)
    with serve(root, read_only=True) as served:
        page = served.ask(f"/generate?run={run_id(served)}").text
        for text in ("hx-post", ">Make<", "Free the card", 'type="file"'):
            assert text not in page
        assert python_of("wan_generate_video.py") in html.unescape(re.sub("<!--.*?-->", "", page))
        assert post(served, "make", fields_of(served)).status == 403
        assert post(served, "form", fields_of(served)).status == 403
        assert send(served, "file", tmp_path / "a.png").status == 403
        assert send(served, "settings", tmp_path / "a.png").status == 403
        with open_page(f"{served.url}/generate?run={run_id(served)}") as shown:
            shown.get_by_label("Steps").fill("17")
            wait_until(shown, "document.querySelector('#command').textContent.includes('--infer_steps 17')")
    assert not (root / "generated").exists()
    assert not (root / "reelsmith-queue").exists()


def test_posts_from_elsewhere_are_refused(served: Served, root: Path) -> None:
    body = urlencode(fields_of(served))
    for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert served.ask("/generate/make", "POST", body, **headers).status == 403
        assert served.ask("/generate/file?name=a.png", "POST", "x", **headers).status == 403
    assert states(root) == []


def test_texts_are_shown_as_texts(served: Served, root: Path) -> None:
    hostile = "</textarea><script>alert(1)</script>"
    fields = fields_of(served, prompt=hostile, negative=hostile, steps='"><img src=x onerror=alert(1)>')
    page = served.ask(f"/generate?{urlencode(fields)}").text
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    (root / "reelsmith-queue" / "making").mkdir(parents=True, exist_ok=True)
    with open_page(f"{served.url}/generate?{urlencode(fields)}") as shown:
        assert shown.get_by_label("Prompt").input_value() == hostile
        assert shown.problems == []


@pytest.mark.parametrize("name", ["../1", "a" * 16 + "/..", "%00", "x" * 5000, "0123456789ABCDEF"])
def test_drafts_have_no_other_names(served: Served, root: Path, name: str) -> None:
    fields = fields_of(served, draft=name)
    assert post(served, "form", fields).status == 200
    folder = root / "reelsmith-queue" / "making" / "drafts"
    assert not folder.exists() or [*folder.iterdir()] == []
    assert served.ask(f"/generate?{urlencode({'draft': name})}").status == 200


def test_old_drafts_and_damaged_ones_are_left_out(served: Served, root: Path) -> None:
    folder = root / "reelsmith-queue" / "making" / "drafts"
    for number in range(45):
        post(served, "form", fields_of(served, draft=f"{number:016x}", prompt=f"number {number}"))
    assert len([*folder.iterdir()]) == 40
    (folder / f"{44:016x}.json").write_bytes(b"[]")
    assert served.ask(f"/generate?draft={44:016x}").status == 200


def test_waiting_render_jobs_say_for_what_they_wait(
    served: Served,
    root: Path,
    lasting: list[str],  # noqa: F811
) -> None:
    queue = JobQueue(root / "reelsmith-queue")
    number = queue.add(lasting, root)
    queue.begin_work()
    try:
        wait_for(lambda: [job.state for job in queue.jobs()] == [RUNNING])
        assert post(served, "make", fields_of(served)).status == 200
        words = f"1 waiting: job {number} of the queue runs."
        wait_for(
            lambda: words in served.ask("/generate/work").text, lambda: served.ask("/generate/work").text
        )
        assert states(root) == [WAITING]
    finally:
        queue.stop(number)
        queue.stop(number)
        queue.end_work()


@pytest.mark.parametrize("source", ["run", "model wan22 t2v-A14B", "model framepack i2v"])
def test_the_page_fits_has_names_and_no_serious_fault(axe: str, served: Served, source: str) -> None:  # noqa: F811
    fields = fields_of(served) if source == "run" else {"source": source}
    post(served, "make", {**fields_of(served), "prompt": "fail"})
    with open_page(f"{served.url}/generate?{urlencode(fields)}") as page:
        wait_until(page, "document.querySelector('.died') !== null")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert_fits(page)
        page.evaluate(axe)
        assert list_errors(page) == []
        is_in_form = "document.activeElement.closest('#make') !== null"
        for _ in range(30):  # by keyboard alone, behind the links of the frame
            page.keyboard.press("Tab")
            if page.evaluate(is_in_form):
                break
        assert page.evaluate(is_in_form)


@contextlib.contextmanager
def serve_alone(root: Path) -> Iterator[tuple["subprocess.Popen[str]", Served]]:
    """Serve the page in a process of its own, with the real generation script."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "run_browser.py", root, "--port", "0", "--no_token"],
        cwd=root,
        env={**os.environ, **QUIET},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().strip().rstrip("/").rpartition(":")[2])
        yield process, Served(port, Runs([root]))
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="it has no such signal")
def test_a_killed_server_loses_no_render_job_and_leaves_no_process(root: Path) -> None:
    with serve_alone(root) as (server, served):
        fields = fields_of(served, steps="400", prompt="a red square")
        assert post(served, "make", fields).status == 200
        assert post(served, "make", {**fields, "steps": "2"}).status == 200
        wait_for(lambda: requests(root)[0]["done"] > 0, lambda: str(requests(root)))
        session = json.loads((root / "reelsmith-queue" / "making" / "session.json").read_text())
        server.kill()
        server.wait()
        # it notices at its next step that nobody reads
        wait_for(lambda: not psutil.pid_exists(session["process"]["number"]))
    with serve_alone(root) as (_, served):
        assert ENDED_MEANWHILE in html.unescape(served.ask("/generate").text)
        wait_for(lambda: states(root)[1] == FINISHED, lambda: str(requests(root)))
        assert Path(requests(root)[1]["file"]).is_file()
        assert post(served, "again", {"id": "1"}).status == 200
        wait_for(lambda: requests(root)[0]["done"] > 0, lambda: str(requests(root)))
        assert post(served, "cancel", {"id": "1"}).status == 200
        wait_for(lambda: states(root) == [STOPPED, FINISHED], lambda: str(requests(root)))
        made = sorted(path.suffix for path in (root / "generated").iterdir())
        assert made == [".mp4"]


@pytest.mark.slow
def test_a_wrong_model_file_is_named_where_one_clicked(root: Path, tmp_path: Path) -> None:
    write_generating(root / "wrong", "y")
    history = next((root / "wrong").glob("*-history.jsonl"))
    text = history.read_text(encoding="utf-8")
    wrong = root / "wrong" / "other.safetensors"
    save_file({"x": torch.zeros(2)}, wrong)
    history.write_text(text.replace(f"{POCKET / 'dit'}.safetensors", str(wrong)), encoding="utf-8")
    with serve_alone(root) as (_, served):
        fields = fields_of(served, source=f"run {run_id(served, 'y')}")
        with open_page(f"{served.url}/generate?{urlencode(fields)}") as page:
            page.get_by_role("button", name="Make", exact=True).click()
            wait_until(page, "document.querySelector('.died .bad') !== null")
            newest = page.locator("#ended > summary")
            assert "other.safetensors" in newest.inner_text()
            newest.click()
            assert "other.safetensors" in page.locator(".died .bad").inner_text()
            page.get_by_text("Last lines").click()
            assert "other.safetensors" in page.locator(".last").inner_text()


def test_home_folders_in_fields_of_files_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    fields = {"lora_file": ["~/a.safetensors"], "references": ["~/b.png\nc.png"], "prompt": ["~/not a file"]}
    texts = GenerateForm.from_fields(fields).field_values
    assert texts["lora_file"] == str(Path.home() / "a.safetensors")
    assert texts["references"] == f"{Path.home() / 'b.png'}\nc.png"
    assert texts["prompt"] == "~/not a file"
