"""The buttons of a run: what they write, what they refuse, and that they say so where one clicked."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image

from browser.jobs.jobs import JobQueue, open_queue
from browser.runs.runs import RUNNING, Runs
from pocket.measure import POCKET
from tests.browser.described_folders import describe, trace
from tests.browser.serving import Answer, Served, python_of, serve_runs, write_run
from tests.chromium import open_page, read_page, wait_until
from tests.commands import QUIET, ROOT, run_python
from tests.waiting import MILLISECONDS, PATIENCE
from training.reports.history import History, history_path


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    """The queue of the served folder; what still runs at the end is killed."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    queue = open_queue(Runs([tmp_path]), read_only=False)
    yield queue
    queue.end_work()
    while running := [job for job in queue.jobs() if job.state == RUNNING]:
        queue.stop(running[0].id)


@pytest.fixture
def served(tmp_path: Path, queue: JobQueue) -> Iterator[Served]:
    describe(tmp_path / "my clips")
    queue.begin_work = lambda: None  # type: ignore[method-assign]
    with serve_runs(tmp_path, queue=queue) as served:
        yield served


def address_of(served: Served, name: str = "own") -> str:
    listed = served.ask("/").text
    (address,) = re.findall(rf'href="(/run/\w+/)">(?:[^<]|<(?!/a))*<h2>{name}</h2>', listed)
    return str(address)


def press(served: Served, what: str, name: str = "own", **form: object) -> Answer:
    body = urlencode({key: str(value) for key, value in form.items()})
    return served.ask(f"{address_of(served, name)}do/{what}", "POST", body, Origin=served.url)


def panel(served: Served, what: str, name: str = "own") -> Answer:
    return served.ask(f"{address_of(served, name)}panel/{what}")


def mark_in(answer: Answer, field: str = "have") -> str:
    (mark,) = {*re.findall(rf'name="{field}" value="(\w*)"', answer.text)}
    return str(mark)


def lines(queue: JobQueue) -> list[str]:
    return [job.line for job in queue.jobs()]


def buttons(served: Served, name: str = "own") -> set[str]:
    page = served.ask(f"{address_of(served, name)}deeds").text
    return set(re.findall(r"<button[^>]*>([^<]*)<", page))


def write_generating_run(output: Path, kind: str | None, script: str = "wan_generate_video.py") -> None:
    """Write a run whose history has a command of a script that makes something with its file."""
    path = write_run(output, "own", kind=kind)
    line = f"python {script} --lora_weight {output.name}/own.safetensors --prompt x"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6, "commands": [["Generate with it", line, line, "", ""]]}) + "\n")


def write_controlled_run(output: Path, missing: str = "", with_gaps: bool = False) -> None:
    """Write a run whose history has a command that follows a control picture with the run's file."""
    info = {"written_in": str(output), "working_folder": str(output.parent)}
    path = write_run(output, "own", kind="good", **info)
    control = output / "edges.png"
    Image.new("RGB", (8, 8)).save(control)
    argv = f"--ckpt model.safetensors --control_net_lllite_models {output.name}/own.safetensors "
    argv += f"--prompt 'a cat' --guide_image_path {output.name}/edges.png"
    if with_gaps:
        argv = argv.replace("a cat", "what it should show").replace(
            f"{output.name}/edges.png", "CONTROL_PICTURE"
        )
        argv += " --vae VAE_FILE"
    line = f"python gen_img.py {argv}"
    with path.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"step": 6, "commands": [["Generate with it", line, line, "", missing]]}) + "\n"
        )
    (output.parent / "model.safetensors").touch()


def test_a_control_network_is_used_by_one_click_of_its_page(
    served: Served, queue: JobQueue, tmp_path: Path
) -> None:
    output = tmp_path / "my clips" / "output"
    write_controlled_run(output)
    page = served.ask(f"{address_of(served)}deeds").text
    assert "Make an image with it" in page
    assert "is used by a command, in a terminal" not in page
    labels = dict(re.findall(r'<label for="(word-\d+)">([^<]+)</label>', page))
    values = dict(re.findall(r'<input id="(word-\d+)" name="word \d+" value="([^"]*)"', page))
    fields = {labels[id]: values[id] for id in labels}
    assert fields == {"Prompt": "a cat", "Control image": "output/edges.png"}
    listed = re.search('<datalist id="control_pictures">(.*?)</datalist>', page)
    assert listed is not None
    assert '<option value="cat.png">' in listed[1]

    other = output / "other.png"
    other.write_bytes((output / "edges.png").read_bytes())
    prompt, control = (id.replace("-", " ") for id in labels)
    assert press(served, "make", **{prompt: "two dogs", control: other}).status == 200

    (job,) = queue.jobs()
    assert job.argv[1:] == [
        *("gen_img.py", "--ckpt", "model.safetensors"),
        *("--control_net_lllite_models", "output/own.safetensors", "--prompt", "two dogs"),
        *("--guide_image_path", str(other)),
    ]
    assert press(served, "make", **{prompt: "two dogs", control: "/etc/passwd"}).status == 422


def test_the_samples_of_a_run_are_scored_by_a_job(
    served: Served, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "my clips" / "output"
    info = {"written_in": str(output), "working_folder": str(output.parent)}
    history = write_run(output, "own", kind="good", **info)
    model = tmp_path / "models" / "score_clip"
    for is_there in (False, True):
        if is_there:
            model.mkdir(parents=True)
        further = served.ask(f"{address_of(served)}deeds").text
        assert ("Score the samples" in further) is is_there
        assert press(served, "score").status == (200 if is_there else 422)
    argv = ["tools/score.py", str(history), "--model", str(Path("models/score_clip"))]
    assert queue.jobs()[0].argv[1:] == argv
    (tmp_path / "models" / "wd_tagger").mkdir()
    press(served, "score")
    assert queue.jobs()[-1].argv[1:] == [*argv, "--tagger", str(Path("models/wd_tagger"))]


def test_what_a_command_lacks_is_typed_into_fields(served: Served, queue: JobQueue, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_controlled_run(output, "CONTROL_PICTURE 'what it should show' VAE_FILE", with_gaps=True)
    page = served.ask(f"{address_of(served)}deeds").text
    names = dict(re.findall(r'<label for="(word-\d+)">([^<]+)</label>', page))
    assert [*names.values()] == ["Prompt", "Control image", "--vae"]
    assert "CONTROL_PICTURE" not in page
    prompt, control, vae = (id.replace("-", " ") for id in names)
    empty = press(served, "make", **{prompt: "two dogs", vae: "model.safetensors"})
    assert (empty.status, "Fill in Control image." in empty.text) == (422, True)
    (tmp_path / "my clips" / "vae.safetensors").touch()
    typed = {prompt: "two dogs", control: "output/edges.png", vae: "vae.safetensors"}
    assert press(served, "make", **typed).status == 200
    (job,) = queue.jobs()
    assert job.argv[-6:] == [
        "--prompt",
        "two dogs",
        "--guide_image_path",
        "output/edges.png",
        *job.argv[-2:],
    ]
    assert job.argv[-2:] == ["--vae", "vae.safetensors"]


@pytest.mark.parametrize("script", ["none.py"])
def test_a_run_that_no_form_can_be_filled_from_says_so(script: str, served: Served, tmp_path: Path) -> None:
    write_generating_run(tmp_path / "my clips" / "output", "good", script)
    page = served.ask(f"{address_of(served)}deeds").text
    assert "Generate with it" not in page
    assert "This file is used by a command, in a terminal" in page
    run = address_of(served).split("/")[2]
    form = served.ask(f"/generate?run={run}").text
    assert "its history has no command that this page can run" in form
    assert '<option value="" selected>choose …</option>' in form
    assert 'id="prompt"' not in form
    origin = {"Origin": served.url, "Content_Type": "application/x-www-form-urlencoded"}
    again = served.ask("/generate/form", "POST", "source=&draft=0123456789abcdef", **origin).text
    assert re.findall('<pre id="command"[^>]*>(.*?)</pre>', form + again) == ["", ""]
    made = served.ask("/generate/make", "POST", "source=&draft=0123456789abcdef", **origin)
    assert (made.status, "Model: choose one." in made.text) == (422, True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("draft", {"Check", "Start", "Edit samples", "Remove"}),
        ("good", {"Train on", "Copy and change", "Edit samples", "Generate with it", "Remove"}),
        ("", {"Continue", "Train on", "Copy and change", "Edit samples", "Generate with it", "Remove"}),
        (None, {"Stop", "Edit samples", "Generate with it", "Remove"}),
    ],
)
def test_a_run_has_the_buttons_of_its_state(
    kind: str | None, expected: set[str], served: Served, tmp_path: Path
) -> None:
    if kind != "draft":
        write_generating_run(tmp_path / "my clips" / "output", kind)
    assert buttons(served) == expected


def test_start_puts_the_command_that_it_shows_into_the_queue(
    served: Served, queue: JobQueue, tmp_path: Path
) -> None:
    page = served.ask(address_of(served)).text
    typed = f"{python_of('reelsmith.py')} run '{tmp_path / 'my clips'}' --check"
    assert html.escape(typed) in html.escape(html.unescape(re.sub("<!--.*?-->", "", page)))

    assert press(served, "start").status == 200

    assert lines(queue) == [f"reelsmith run '{tmp_path / 'my clips'}'"]
    again = press(served, "start")
    assert (again.status, "already in the queue" in again.text) == (422, True)
    assert press(served, "stop").text == "<span>It was removed from the queue.</span>"
    assert lines(queue) == []
    assert "It is not running: it is draft" in press(served, "stop").text


def test_a_training_is_asked_by_its_file_and_says_that_it_was(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_run(output, "own", kind=None)
    assert press(served, "stop").text.startswith("<span>Requested: it saves")
    assert (output / "own.stop").is_file()
    assert "asked to stop" in served.ask("/").text
    assert "already asked" in served.ask(f"{address_of(served)}deeds").text


def test_what_a_terminal_has_begun_is_not_ended_from_here(served: Served, tmp_path: Path) -> None:
    begun = trace(tmp_path / "my clips")
    begun.note(["python", "wan_cache_latents.py"])
    answer = press(served, "stop")
    assert (answer.status, "end it there with Ctrl-C" in answer.text) == (422, True)
    assert "stop it first" in panel(served, "remove").text


@pytest.mark.parametrize("steps", ["", "x", "0", "-5", "6", "1e3", "99999999999", "000000000001999999999"])
def test_train_on_takes_only_more_steps(steps: str, served: Served, queue: JobQueue, tmp_path: Path) -> None:
    write_run(tmp_path / "my clips" / "output", "own", steps=6, kind="good")
    before = (tmp_path / "my clips" / "run.toml").read_bytes()
    assert press(served, "train_on", steps=steps).status == 422
    assert ((tmp_path / "my clips" / "run.toml").read_bytes(), lines(queue)) == (before, [])


def test_train_on_changes_the_steps_and_what_follows_and_starts(
    served: Served, queue: JobQueue, tmp_path: Path
) -> None:
    write_run(tmp_path / "my clips" / "output", "own", steps=10, kind="good")
    path = describe(tmp_path / "my clips", save_every_n_steps=10, sample_every_n_steps=3) / "run.toml"
    before = path.read_text(encoding="utf-8")
    actions = served.ask(f"{address_of(served)}deeds")
    assert 'value="20"' in actions.text
    path.write_text(before.replace("# mine", "# changed"), encoding="utf-8")
    answer = press(served, "train_on", steps="3000", have=mark_in(actions))
    assert (answer.status, "changed in the meantime" in answer.text) == (422, True)
    path.write_text(before, encoding="utf-8")

    message = press(served, "train_on", steps="3000", have=mark_in(actions)).text

    assert (
        "to 3,000 steps. Written into run.toml: max_train_steps = 3000, save_every_n_steps = 300" in message
    )
    assert "sample_every_n_steps = 3 stays: it was typed by hand" in message
    after = path.read_text(encoding="utf-8")
    expected = before.replace("max_train_steps = 10", "max_train_steps = 3000")
    assert after == expected.replace("save_every_n_steps = 10", "save_every_n_steps = 300")
    assert lines(queue) == [f"reelsmith run '{tmp_path / 'my clips'}'"]


def test_again_opens_new_with_the_form_filled_and_another_name(served: Served, tmp_path: Path) -> None:
    write_run(tmp_path / "my clips" / "output", "own", kind="good")
    actions = served.ask(f"{address_of(served)}deeds").text
    fields = dict(re.findall(r'name="(folder|name)" value="([^"]*)"', actions))
    assert fields == {"folder": str(tmp_path / "my clips"), "name": "own-2"}
    page = served.ask(f"/new?{urlencode(fields)}").text
    assert 'name="name" value="own-2"' in page
    assert 'name="steps" value="10"' in page


def test_prompts_are_written_unless_the_file_has_changed(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "my clips" / "prompts.txt"
    opened = panel(served, "prompts")
    assert "a cat --s 2</textarea>" in opened.text
    have = mark_in(opened)

    assert press(served, "prompts", text="a dog\r\na <b>cow", have=have).status == 200
    assert path.read_text(encoding="utf-8") == "a dog\na <b>cow\n"

    conflict = press(served, "prompts", text="mine", have=have)
    assert conflict.status == 422
    assert "Nothing was written" in conflict.text
    assert ">mine</textarea>" in conflict.text
    assert "a &lt;b&gt;cow" in conflict.text
    assert press(served, "prompts", text="mine", have=mark_in(conflict)).status == 200
    assert path.read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize("prompts", ["../../secret.txt", "/etc/passwd", "run.toml", "link.txt"])
def test_no_other_file_is_edited_as_prompts(prompts: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret", encoding="utf-8")
    folder = describe(tmp_path / "roots" / "clips", sample_prompts=prompts)
    (folder / "link.txt").symlink_to(secret)
    with serve_runs(tmp_path / "roots") as served:
        assert "Edit samples" not in served.ask(f"{address_of(served)}deeds").text
        assert press(served, "prompts", text="x", have="").status == 422
        assert "secret" not in panel(served, "prompts").text.replace("secret.txt", "")
    assert secret.read_text(encoding="utf-8") == "a secret"


def test_remove_lists_asks_and_moves_but_no_picture(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "my clips"
    write_run(folder / "output", "own", kind="good")
    write_run(folder / "output", "own-2", kind="good")
    (folder / "output" / "own-state").mkdir()
    (folder / "output" / "own-state" / "state.bin").write_bytes(bytes(5000))
    before = sorted(path.name for path in folder.iterdir())
    asked = panel(served, "remove")
    listed = re.sub("<!--.*?-->", "", asked.text)
    assert f"{folder / 'output' / 'own.safetensors'}" in listed
    assert "own-2" not in listed
    assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "output" / "own-state" / "more.bin").write_bytes(b"1")
    assert press(served, "remove", have=mark_in(asked)).status == 422

    answer = press(served, "remove", have=mark_in(panel(served, "remove")))

    assert answer.headers["hx-redirect"] == "/"
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"cat.png", "cat.txt", "run.toml", "output/own-2.safetensors"} < left
    assert not {name for name in left if re.match(r"output/own[-.](?!2)", name)}
    (moved,) = (tmp_path / "reelsmith-bin").iterdir()
    assert (moved / "my clips" / "output" / "own-state" / "state.bin").stat().st_size == 5000
    assert ">draft<" in served.ask("/").text


@pytest.mark.skipif(os.name == "nt", reason="the command is PowerShell's there")
def test_the_command_that_remove_shows_moves_the_same_files(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_run(output, "own", kind="good")
    write_run(output, "own-2", kind="good")
    page = re.sub("<!--.*?-->", "", panel(served, "remove").text)
    (shown,) = re.findall("<code>(mkdir .*?)</code>", page)

    subprocess.run(["sh", "-c", html.unescape(shown)], cwd="/", check=True)

    assert {path.name for path in output.iterdir() if path.name.startswith("own.")} == set()
    assert (output / "own-2.safetensors").is_file()
    assert (tmp_path / "reelsmith-bin" / "own" / "own.safetensors").is_file()


def test_remove_of_a_draft_takes_what_new_wrote_and_no_picture(served: Served, tmp_path: Path) -> None:
    press(served, "remove", have=mark_in(panel(served, "remove")))
    assert sorted(path.name for path in (tmp_path / "my clips").iterdir()) == ["cache", "cat.png", "cat.txt"]
    assert "No run yet" in served.ask("/").text
    assert "<button>New</button>" in served.ask("/").text


def test_a_running_training_is_not_removed(served: Served, tmp_path: Path) -> None:
    write_run(tmp_path / "my clips" / "output", "own", kind=None)
    answer = press(served, "remove", have="")
    assert (answer.status, "stop it first" in answer.text) == (422, True)
    assert (tmp_path / "my clips" / "output" / "own.safetensors").exists()


def write_resumable(folder: Path, name: str, **told: object) -> None:
    """Write a stopped run of a terminal, with the command that continues it."""
    info = {"written_in": str(folder), "working_folder": str(folder), **told}
    write_run(folder, name, kind="", **info)
    history = History(history_path(folder, name), 1, 6)
    line = "python tools/download.py --list --max_train_steps 10 --resume latest-or-fail"
    history.add(6, commands=[["Go on after a stop", line, line, ""]])
    history.flush()


def test_a_run_of_a_terminal_continues_with_its_own_command(
    served: Served, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("browser.jobs.typed_jobs.check_options", lambda argv, folder, earlier, seconds: None)
    write_resumable(tmp_path / "other", "typed", changed=[["output_dir", str(tmp_path / "other")]])
    assert {"Continue", "Train on", "Remove"} <= buttons(served, "typed")
    assert press(served, "start", "typed").status == 200
    assert press(served, "train_on", "typed", steps="50").status == 200
    default = "python tools/download.py --list --max_train_steps 10 --resume latest-or-fail"
    assert lines(queue) == [default, default.replace(" 10 ", " 50 ")]


def test_samples_of_a_described_folder_lead_to_their_interval(served: Served, tmp_path: Path) -> None:
    (address,) = re.findall(r'href="([^"]+)">How often they are made', panel(served, "prompts").text)
    assert html.unescape(address) == f"/new?{urlencode({'folder': tmp_path / 'my clips'})}#samples"
    assert 'id="samples"' in served.ask(html.unescape(address).partition("#")[0]).text


def test_a_foreign_run_toml_is_a_warning_and_no_error(served: Served, tmp_path: Path) -> None:
    describe(tmp_path / "their clips", "theirs", is_trusted=False)
    assert '<p class="warn">This run.toml comes from elsewhere.' in panel(served, "read", "theirs").text


def test_the_command_of_a_foreign_run_is_read_on_the_page_of_the_queue(
    served: Served, queue: JobQueue, tmp_path: Path
) -> None:
    process = {"machine": 1, "number": 1, "born": 1}
    write_resumable(tmp_path / "other", "foreign", process=process)
    assert "review it first" in served.ask(f"{address_of(served, 'foreign')}deeds").text
    assert press(served, "start", "foreign").status == 422
    assert lines(queue) == []


FOREIGN = {
    "log_with": "wandb",
    "huggingface_repo_id": "evil/<b>owner",
    "network_module": "my_code",
    "output_dir": "../elsewhere",
    "on_end": "rm -rf everything",
}


def test_a_foreign_run_toml_is_shown_with_what_it_may_do(queue: JobQueue, tmp_path: Path) -> None:
    queue.begin_work = lambda: None  # type: ignore[method-assign]
    folder = describe(tmp_path / "clips", is_trusted=False, **FOREIGN)
    path = folder / "run.toml"
    with serve_runs(tmp_path, queue=queue) as served:
        read = panel(served, "read")
        text = re.sub("<!--.*?-->", "", read.text)
        assert "comes from elsewhere" in text
        assert f"writes into {tmp_path / 'elsewhere'} <small>outside of {folder}" in text
        assert "uploads the trained files to evil/&lt;b&gt;owner" in text
        assert "gives its losses to wandb" in text
        assert "loads the code my_code" in text
        assert "starts rm -rf everything <small>`run` refuses it" in text
        assert press(served, "start").status == 422
        mark = mark_in(read, "read")
        path.write_text(path.read_text(encoding="utf-8") + "# more\n", encoding="utf-8")
        assert press(served, "start", read=mark).status == 422
        assert lines(queue) == []
        assert press(served, "start", read=mark_in(panel(served, "read"), "read")).status == 200
    assert lines(queue) == [f"reelsmith run {folder}"]


def test_with_read_only_nothing_is_offered_or_done(tmp_path: Path) -> None:
    describe(tmp_path / "clips")
    with serve_runs(tmp_path, read_only=True) as served:
        page = served.ask(address_of(served)).text
        assert "<button" not in page
        for what in ("start", "check", "stop", "train_on", "go_on", "prompts", "remove"):
            assert press(served, what).status == 403
        assert "Move it into the bin" not in panel(served, "remove").text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips"]


@pytest.mark.parametrize("id", ["x", "0" * 16, "..%2f..", "%00"])
def test_no_other_id_answers(id: str, served: Served) -> None:
    for rest in ("", "deeds", "standing", "panel/remove"):
        assert served.ask(f"/run/{id}/{rest}").status == 404
    assert served.ask(f"/run/{id}/do/start", "POST", "", Origin=served.url).status in (404, 405)


def test_a_missing_model_file_is_said_where_one_clicked(
    tmp_path: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    (describe(tmp_path / "my clips") / "cache" / "dit.safetensors").unlink()
    argv = ["reelsmith", "run", str(tmp_path / "my clips")]  # without --download
    monkeypatch.setattr("browser.pages.runs.run_buttons.find_start_argv", lambda *_: argv)
    with serve_runs(tmp_path, queue=queue) as served, open_page(f"{served.url}/") as page:
        page.get_by_role("link", name="own").click()
        page.get_by_role("button", name="Check").wait_for()
        wait_until(page, "document.title === 'own'")
        page.get_by_role("button", name="Start").click()
        page.get_by_text("It is in the queue").wait_for()
        page.locator(".standing.died").wait_for(timeout=120_000)
        reason = page.locator(".reason").inner_text()
        assert "dit.safetensors" in reason
        assert page.get_by_label("last lines").inner_text().strip()
        assert page.get_by_role("button", name="Continue").is_visible()
        page.goto(f"{served.url}/")
        assert "dit.safetensors" in page.locator(".plate .reason").inner_text()
        assert page.problems == []


def test_prompts_are_edited_and_a_draft_removed_by_clicks(served: Served, tmp_path: Path) -> None:
    folder = tmp_path / "my clips"
    with open_page(f"{served.url}{address_of(served)}") as page:
        page.get_by_role("button", name="Edit samples").click()
        page.get_by_label("Sample 1 prompt").fill("a cow")
        page.get_by_label("Sample 1 steps").fill("3")
        page.get_by_label("Sample 1 width").fill("65")
        page.get_by_text("width 65: use a multiple of 16. The sample is generated with 64.").wait_for()
        page.get_by_label("Sample 1 width").fill("")
        page.get_by_role("button", name="One more sample").click()
        page.locator("#prompt-4:focus").wait_for()
        assert page.get_by_label("Sample 1 prompt").input_value() == "a cow"
        (folder / "prompts.txt").write_text("a goat\n", encoding="utf-8")
        page.get_by_role("button", name="Save the samples").click()
        page.get_by_text("Nothing was written").wait_for()
        assert page.get_by_label("what the file holds").inner_text() == "a goat"
        page.get_by_role("button", name="Write mine over it").click()
        page.get_by_text("Written into prompts.txt").wait_for()
        assert (folder / "prompts.txt").read_text(encoding="utf-8") == "a cow --s 3\n"

        page.get_by_role("button", name="Remove").click()
        page.get_by_role("button", name="Move it into the bin").click()
        page.wait_for_url(f"{served.url}/")
        assert page.get_by_role("button", name="New").is_visible()
        errors = [error for error in page.problems if "422" not in error]
        assert errors == []
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "cat.png", "cat.txt"]


def test_typed_steps_stay_and_the_page_follows_the_run(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_run(output, "own", kind="good")
    with open_page(f"{served.url}{address_of(served)}") as page:
        page.get_by_label("up to").fill("77")
        page.wait_for_timeout(2500)
        assert page.get_by_label("up to").input_value() == "77"
        page.get_by_role("button", name="Train on").click()
        page.get_by_text("It is in the queue and trains to 77 steps.").wait_for()
        page.get_by_text("waiting, position 1").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("It was removed from the queue").wait_for()
        page.get_by_role("button", name="Copy and change").click()
        page.wait_for_url("**/new?**")
        assert page.get_by_label("Name").input_value() == "own-2"
        assert page.get_by_label("Training steps", exact=True).input_value() == "77"
        assert page.problems == []


def test_a_run_is_started_and_taken_back_by_the_keyboard_alone(served: Served, queue: JobQueue) -> None:
    with open_page(f"{served.url}{address_of(served)}") as page:
        page.get_by_role("button", name="Start").focus()
        page.keyboard.press("Enter")
        page.get_by_text("waiting, position 1").wait_for()
        wait_until(page, "document.activeElement.closest('.stands, .first') !== null")
        while page.evaluate("document.activeElement.id") != "stop":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_text("It was removed from the queue").wait_for()
        wait_until(page, "!!document.activeElement.closest('#deeds')")
        assert page.problems == []
    assert lines(queue) == []


def test_a_draft_leads_to_the_page_of_its_training(served: Served, tmp_path: Path) -> None:
    with open_page(f"{served.url}{address_of(served)}") as page:
        page.get_by_role("button", name="Start").wait_for()
        write_run(tmp_path / "my clips" / "output", "own", kind=None)
        page.locator("#samples").wait_for(timeout=PATIENCE * MILLISECONDS)
        assert page.get_by_role("button", name="Stop").is_visible()
        assert page.problems == []


def test_the_end_is_told_only_if_somebody_wants_it(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_run(output, "own", kind=None)
    with open_page(f"{served.url}{address_of(served)}") as page:
        box = page.get_by_label("tell me when a run ends")
        assert not box.is_checked()
        box.check()
        page.locator("#told_how").get_by_text("sound").wait_for()
        page.wait_for_timeout(500)
        shutil.rmtree(output)
        write_run(output, "own", kind="good")
        wait_until(page, "document.title === 'own: finished'")


@pytest.mark.parametrize("kind", ["good", ""])
def test_no_button_comes_to_the_place_of_stop(kind: str, served: Served, tmp_path: Path) -> None:
    output = tmp_path / "my clips" / "output"
    write_generating_run(output, None)
    with open_page(f"{served.url}{address_of(served)}", width=390) as page:
        page.get_by_role("button", name="Stop").wait_for()
        box = page.locator("#stop").bounding_box()
        assert box is not None
        shutil.rmtree(output)
        write_generating_run(output, kind)
        wait_until(page, "document.getElementById('stop') === null")
        places = page.locator(":is(#deeds, #further) button").all()
        tops = [place.bounding_box()["y"] for place in places]
        assert len(tops) > 2
        assert min(tops) >= box["y"] + box["height"]


def test_train_on_this_opens_new_for_a_dataset(served: Served, tmp_path: Path) -> None:
    served.ask("/")
    with open_page(f"{served.url}/datasets") as page:
        page.get_by_role("button", name="Train on this").click()
        page.wait_for_url("**/new?**")
        assert page.get_by_label("Folder").input_value() == str(tmp_path / "my clips")


@pytest.mark.parametrize("width", [360, 2560])
def test_a_page_fits_its_window(width: int, served: Served, tmp_path: Path) -> None:
    with open_page(f"{served.url}{address_of(served)}", width=width) as page:
        page.get_by_role("button", name="Remove").click()
        page.get_by_role("button", name="Move it into the bin").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_run_is_watched_from_its_draft_to_its_lora(
    tmp_path: Path, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pocket model learns from twelve pictures; each state is seen on the page where one clicked."""
    folder = tmp_path / "my clips"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 90, 90)).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text("a color\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    argv = ["new", str(folder), "--family", "wan", "--task", "t2v-1.3B", "--trigger_word", "ohwx"]
    argv += ["--output_name", "own", "--max_train_steps", "4", "--memory", "0"]
    for option in ("dit", "vae", "t5"):
        argv += ["--model_file", f"{option}={POCKET / option}.safetensors"]
    run_python(str(ROOT / "reelsmith.py"), *argv)
    (folder / "prompts.txt").write_text("a color --s 2 --w 32 --h 32 --f 1\n" * 2, encoding="utf-8")
    seen: list[str] = []
    with serve_runs(tmp_path, queue=queue) as served, open_page(f"{served.url}{address_of(served)}") as page:
        page.get_by_role("button", name="Start").click()
        for _ in range(3000):
            # of the page, and of the buttons
            texts = read_page(page, page.locator(".status").all_inner_texts)
            word = (texts[-1] if texts else "loading").split()[0].rstrip(",")
            seen += [word] if word not in seen else []
            if word in ("finished", "died"):
                break
            page.wait_for_timeout(100)
        assert seen[-1] == "finished", page.locator("#deeds").inner_text()
        assert {"checking", "caching", "loading"} <= set(seen)
        assert page.get_by_role("button", name="Generate with it").is_visible()
        assert page.problems == []
    assert (folder / "output" / "own.safetensors").is_file()


def test_the_page_of_a_run_whose_folder_is_renamed_says_so_and_leads_on(tmp_path: Path) -> None:
    write_run(tmp_path / "roots" / "out", "x")
    with serve_runs(tmp_path / "roots") as served, open_page(served.url + served.of("x")) as page:
        (tmp_path / "roots" / "out").rename(tmp_path / "roots" / "away")
        page.get_by_text("It no longer exists: its folder was renamed").wait_for(
            timeout=PATIENCE * MILLISECONDS
        )
        page.reload()
        page.get_by_role("link", name="All runs").click()
        page.get_by_text("1 of 1 run").wait_for()
        assert served.ask("/dataset/0123456789abcdef/").status == 404
