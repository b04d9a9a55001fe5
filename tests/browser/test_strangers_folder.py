"""Buttons for a described folder of somebody else: nothing in it writes elsewhere or sends anything."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image

from browser.folders.captioning import TYPED_OPTIONS, CaptionForm, make_caption_argv
from browser.jobs.background_jobs import BackgroundJobs, name_background_job
from browser.jobs.jobs import WAITING, open_queue
from browser.jobs.launch import ENDING_BEFORE_TORCH, check_options
from browser.jobs.typed_jobs import read_jobs
from browser.runs.runs import RUNNING, Runs
from modules.errors import OptionError
from modules.run_limits import FOLDERS_VARIABLE
from tests.browser.described_folders import describe
from tests.browser.serving import Answer, Served, serve_runs
from tests.commands import ROOT, run_python, run_script

MINE = "# of the user\n"
SECONDS = 60.0
VAE = ["--vae", "cache/vae.safetensors"]
CHECK = ["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml", "--check", "--html"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "mine").mkdir()
    for name in ("notes.html", ".bashrc", "cat.txt"):
        (tmp_path / "mine" / name).write_bytes(MINE.encode() + b"K\xe4se, T\xfcr und sch\xf6ne Gr\xfc\xdfe\n")
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    """A folder whose run.toml comes from elsewhere, with a caption that is not UTF-8."""
    folder = describe(root / "theirs", is_trusted=False)
    Image.new("RGB", (64, 64), "red").save(folder / "cat.png")
    (folder / "cat.txt").write_bytes("ein Käse, eine Tür und schöne Grüße".encode("cp1252"))
    return folder


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root) as served:
        yield served


def set_commands(folder: Path, *commands: list[str]) -> None:
    text = (folder / "run.toml").read_text(encoding="utf-8")
    begin = text.index("commands = ")
    download = json.loads(text[begin:].removeprefix("commands = "))[0]
    written = json.dumps(
        [download, *commands, ["python", "wan_train_network.py", "--config_file", "run.toml"]]
    )
    (folder / "run.toml").write_text(f"{text[:begin]}commands = {written}\n", encoding="utf-8")


def press(served: Served, address: str, **fields: str) -> Answer:
    return served.ask(address, "POST", urlencode(fields), Origin=served.url)


def outside(root: Path) -> dict[str, bytes]:
    """All that is next to the root."""
    mine = root.parent / "mine"
    return {path.name: path.read_bytes() for path in mine.rglob("*") if path.is_file()}


def wait_for_end(root: Path, kind: str, folder: Path) -> str:
    """Wait until a background job has ended, and return what it has printed."""
    background_jobs = BackgroundJobs(open_queue(Runs([root]), read_only=False))
    job = background_jobs.wait(name_background_job(kind, folder), SECONDS)
    assert job is not None
    assert job.state != RUNNING
    return job.last_lines(100)


PLACES = {
    "a page": ["{mine}/notes.html"],
    "a page through ..": ["../../mine/notes.html"],
    "a page through a link": ["link/notes.html"],
    "a log": ["check.html", "--console_log_file", "{mine}/.bashrc"],
    "an abbreviated option": ["check.html", "--console_log_f={mine}/.bashrc"],
    "a page twice": ["check.html", "--html", "{mine}/notes.html"],
}


@pytest.mark.slow_cases("a page", "an abbreviated option")
@pytest.mark.parametrize("place", PLACES)
def test_converting_captions_writes_no_file_elsewhere(
    place: str, served: Served, folder: Path, root: Path
) -> None:
    if os.name != "nt":
        (folder / "link").symlink_to(root.parent / "mine")
    words = [word.format(mine=root.parent / "mine") for word in PLACES[place]]
    set_commands(folder, [*CHECK, *words, *VAE])
    before = outside(root)

    press(served, "/new/repair", folder=str(folder))

    text = wait_for_end(root, "repair", folder)
    assert outside(root) == before
    assert re.search("is outside of|not an option|ambiguous|no option|Unknown option", text), text


@pytest.mark.parametrize("table", ["image_directory = '{mine}'", "cache_directory = '{mine}'"])
def test_converting_captions_changes_no_other_folder_below_the_roots(
    table: str, folder: Path, root: Path
) -> None:
    """The folder next to the described one is shown too, but it is not the described one."""
    mine = root / "mine"
    mine.mkdir()
    Image.new("RGB", (64, 64), "red").save(mine / "cat.png")
    (mine / "cat.txt").write_bytes(b"K\xe4se, T\xfcr und sch\xf6ne Gr\xfc\xdfe\n")
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    key, _, value = table.format(mine=mine).partition(" = ")
    dataset = re.sub(rf"{key} = .*", lambda _: f"{key} = {value}", text)
    (folder / "dataset.toml").write_text(dataset, encoding="utf-8")
    set_commands(folder, [*CHECK, "check.html", *VAE])
    before = sorted((path.name, path.read_bytes()) for path in mine.iterdir())
    with serve_runs(root) as served:
        press(served, "/new/repair", folder=str(folder))

    wait_for_end(root, "repair", folder)

    assert sorted((path.name, path.read_bytes()) for path in mine.iterdir()) == before


def test_each_button_for_a_described_folder_starts_a_limited_process(
    served: Served, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, str | None] = {}

    def note(log: Path, **variables: str) -> None:
        started[log.stem.partition("-")[0]] = variables.get(FOLDERS_VARIABLE)
        raise OptionError("noted")

    monkeypatch.setattr("browser.jobs.launch.prepare_process", note)
    set_commands(folder, [*CHECK, "check.html", *VAE])
    fields = {
        "folder": str(folder),
        "family": "wan",
        "task": "t2v-1.3B",
        "trigger_word": "ohwx",
        "steps": "5",
    }
    for what in ("describe", "try", "repair", "memory/plan"):
        press(served, f"/new/{what}", **fields, size="24")
    press(served, "/new/settings/chosen", **fields)

    limits = json.dumps([str(folder)])
    assert started == dict.fromkeys(("compare", "try", "repair", "plan", "chosen"), limits)


def test_captions_that_wait_in_the_queue_keep_their_limits(
    served: Served, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("browser.jobs.jobs.JobQueue.begin_work", lambda self: None)
    assert press(served, "/new/write", folder=str(folder)).status == 200
    queue = open_queue(Runs([root]), read_only=False)
    (job,) = queue.jobs()
    assert (job.state, job.within) == (WAITING, str(folder))
    seen: list[str | None] = []

    def note(log: Path, **variables: str) -> None:
        seen.append(variables.get(FOLDERS_VARIABLE))
        raise OSError("noted")

    monkeypatch.setattr("browser.jobs.launch.prepare_process", note)
    with pytest.raises(Exception, match="noted"):
        queue.start_next()
    assert seen == [json.dumps([str(folder)])]
    assert press(served, "/queue/edit", id=str(job.id), line="python tools/download.py --list").status == 303
    assert queue.jobs()[0].within == ""


def test_a_line_of_the_memory_plan_has_the_limits_of_its_folder(
    served: Served, folder: Path, root: Path
) -> None:
    line = "python tools/download.py --list"
    assert press(served, "/queue/add", line=line, within=str(folder)).status == 303
    assert press(served, "/queue/add", line=line, within=str(root.parent / "mine")).status == 422
    assert press(served, "/queue/add", line=line).status == 303
    assert [job.within for job in open_queue(Runs([root]), read_only=False).jobs()] == [str(folder), ""]


@pytest.mark.parametrize(
    "words",
    [
        ["flux_train_network.py", "--config_file", "evil.toml"],
        ["flux_train_network.py", "--console_log_file", "{mine}/.bashrc"],
        ["flux_train_network.py", "--console_log_file", "{mine}/new.log"],
        ["flux_train_network.py", "--config_file", "new.toml", "--output_config"],
        [
            *["gen_img.py", "--ckpt", "cache/dit.safetensors", "--prompt", "x", "--console_log_file"],
            "{mine}/.bashrc",
        ],
    ],
)
def test_checking_the_options_of_a_line_writes_nothing(words: list[str], folder: Path, root: Path) -> None:
    mine = root.parent / "mine"
    log = json.dumps(str(mine / "x.log"))
    (folder / "evil.toml").write_text(f"console_log_file = {log}\n", encoding="utf-8")
    before, files = outside(root), sorted(folder.rglob("*"))

    check_options(["python", *(word.format(mine=mine) for word in words)], folder)

    assert (outside(root), sorted(folder.rglob("*"))) == (before, files)


@pytest.mark.parametrize("name", [".bashrc", "notes.html", "x.log.sh", "sub/.profile"])
def test_a_file_of_options_appends_only_to_logs(name: str, folder: Path, root: Path) -> None:
    place = root.parent / "mine" / name
    (folder / "evil.toml").write_text(f"console_log_file = {json.dumps(str(place))}\n", encoding="utf-8")
    before = outside(root)

    done = run_script("flux_train_network.py", "--config_file", str(folder / "evil.toml"), check=False)

    assert outside(root) == before
    assert "names only logs that end in .log or .txt" in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("huggingface_repo_id", '"evil/repository"'),
        ("log_with", '"wandb"'),
        ("log_with", '"all"'),
        ("log_tracker_config", '"evil.toml"'),
        ("resume_from_huggingface", "true"),
    ],
)
def test_a_job_sends_nothing_that_only_a_file_says(
    key: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "evil.toml").write_text(f"{key} = {value}\n", encoding="utf-8")
    with pytest.raises(OptionError, match=f"{key} = .* would send data from this machine"):
        check_options(["python", "flux_train_network.py", "--config_file", "evil.toml"], folder)


def test_a_job_takes_no_settings_of_trackers_from_a_file(folder: Path) -> None:
    (folder / "evil.toml").write_text('[wandb]\ndir = "/"\n', encoding="utf-8")
    line = ["python", "wan_train_network.py", "--log_with", "wandb", "--log_tracker_config", "evil.toml"]
    line += ["--dataset_config", "dataset.toml", "--dit", "cache/dit.safetensors", *VAE]
    line += ["--network_module", "networks.lora_wan", "--output_dir", "output", "--output_name", "x"]
    with pytest.raises(OptionError, match="a job takes no settings of other libraries from a file"):
        check_options(line, folder)


def test_many_jobs_at_once_are_refused_before_a_script_is_started(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> None:
        pytest.fail("a script was started")

    monkeypatch.setattr("browser.jobs.typed_jobs.check_options", check)
    lines = "\n# a comment\n\npython wan_train_network.py --seed 1" * 900
    assert "900 jobs are too many" in press(served, "/queue/add", line=lines).text
    lines = "\npython wan_train_network.py --seed 1" * 30 + "\npython evil.py"
    assert "is not a command of this program" in press(served, "/queue/add", line=lines).text


def test_checking_many_jobs_takes_no_more_time_than_all_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now = [0.0]

    def check(words: object, folder: object, earlier: object, seconds: float) -> None:
        given.append(seconds)
        now[0] += 11.0

    monkeypatch.setattr("browser.jobs.typed_jobs.check_options", check)
    monkeypatch.setattr("browser.jobs.typed_jobs.time.monotonic", lambda: now[0])
    lines = "\npython wan_train_network.py --seed 1" * 20
    read_jobs(lines, None)
    assert given == [30.0, 19.0, 8.0]


@pytest.mark.parametrize("text", ["~nobody9/x", "~nobody9", "x" * 5000, "~\0"])
def test_a_path_of_nobody_is_a_sentence_on_the_page(text: str, served: Served, root: Path) -> None:
    answer = press(served, "/new/file?option=ae", file_ae=text)
    assert answer.status == 200
    assert "Traceback" not in answer.text
    if text.startswith("~nobody"):
        assert "here is no such user. Write the path out" in answer.text
    fields = {"folder": "theirs", "family": "flux", "task": "dev", "file_ae": text, "trigger_word": "ohwx"}
    for address in ("/new/describe", "/new/progress", "/new/start", "/queue/add"):
        assert press(served, address, **fields, line=f"cd {text} && reelsmith run x").status < 500
    assert served.ask(f"/new?{urlencode({'folder': text})}").status == 200


def test_new_says_that_there_is_no_such_user(folder: Path) -> None:
    words = ["new", str(folder), "--family", "flux", "--task", "dev", "--trigger_word", "x", "--overwrite"]
    done = run_script("reelsmith.py", *words, "--model_file", "ae=~nobody9/x", check=False)
    assert "--model_file ae '~nobody9/x': there is no such user. Write the path out" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_style_of_the_working_folder_draws_no_picture(folder: Path) -> None:
    """Matplotlib reads the file of this name; with usetex it starts LaTeX with words of the file."""
    code = (
        "import torch, sys; from training.features.show_timesteps_drawing import draw_statistics; "
        "data = draw_statistics({'': torch.ones(1000)}, torch.ones(1000)); "
        "sys.stdout.write(str(hash(data)) if len(data) > 999 else 'none')"
    )
    variables = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    default = run_python("-c", code, folder=folder, environment=variables).stdout
    style = "text.usetex: True\ntext.latex.preamble: \\input{evil}\naxes.facecolor: red\n"
    (folder / "matplotlibrc").write_text(style, encoding="utf-8")

    assert run_python("-c", code, folder=folder, environment=variables).stdout == default
    assert default.lstrip("-").isdecimal()


def test_pictures_go_only_to_a_server_that_was_typed(root: Path, folder: Path) -> None:
    """A printed line that a button starts sends nothing; the address in the page's form was typed."""
    (folder / "cat.txt").write_text("a cat", encoding="utf-8")
    queue = open_queue(Runs((root,)), read_only=False)
    background_jobs = BackgroundJobs(queue)
    words = make_caption_argv(CaptionForm("http://127.0.0.1:9/v1 model"), try_on=1)
    name = name_background_job("try", folder)

    background_jobs.start(name, words, folder, within=folder)
    ended = background_jobs.wait(name, SECONDS)
    assert ended is not None
    assert "--api_base: what a folder describes does not leave this machine" in ended.last_lines()

    background_jobs.start(name, words, folder, within=folder, typed=TYPED_OPTIONS)
    ended = background_jobs.wait(name, SECONDS)
    assert ended is not None
    assert "127.0.0.1:9" in ended.last_lines()
    assert "does not leave this machine" not in ended.last_lines()

    queue.add(words, folder, within=folder, typed=TYPED_OPTIONS)
    job = open_queue(Runs((root,)), read_only=False).jobs()[0]
    assert job.typed == "api_base"
    queue.edit(job.id, job.line)
    assert not queue.jobs()[0].typed


@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))",
        "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "import os; os.chmod('mine', 0)",
        "import os; os.utime('mine', (0, 0))",
        "import os; os.rename('mine', 'other')",
        "import shutil; shutil.move('mine', 'other')",
        "import subprocess; subprocess.run(['true'])",
    ],
)
def test_reading_options_ends_before_anything_is_done(deed: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(MINE, encoding="utf-8")
    before = (tmp_path / "mine").stat()
    script = tmp_path / "script.py"
    script.write_text(f"{deed}\nraise SystemExit('it went on')\n", encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-P", "-c", ENDING_BEFORE_TORCH, str(script)],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )

    assert (done.returncode, done.stderr) == (0, "")
    after = (tmp_path / "mine").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
