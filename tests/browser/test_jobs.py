"""The queue: which lines are jobs, their order, and that they outlive the browser that began them."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser

from browser.core.serving import reopen_queue
from browser.jobs.jobs import QUEUE, STATE, WAITING, Job, JobQueue
from browser.jobs.launch import check_options, find_program, prepare_process, split_arguments
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED
from modules.errors import OptionError, OutputError
from modules.installation import EXTENSIONS
from pocket.measure import IN_FLOAT32, POCKET, model_options
from tests.browser.lasting import lasting  # noqa: F401  # a fixture
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import open_page, wait_until
from tests.commands import QUIET, ROOT, assert_user_error, run_python
from tests.pocket.test_training import cached  # noqa: F401  # a fixture
from tests.waiting import PATIENCE, wait_for

SHORT = ["python", "tools/download.py", "--list"]


def states(queue: JobQueue) -> list[str]:
    return [job.state for job in queue.jobs()]


def wait_for_states(queue: JobQueue, *expected: str) -> list[Job]:
    """Wait until the jobs are in these states, and return them."""
    wait_for(
        lambda: states(queue) == [*expected],
        lambda: "\n".join(f"{job.line}: {job.state}\n{job.last_lines()}" for job in queue.jobs()),
    )
    return queue.jobs()


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobQueue]:
    """A queue that nobody works on; what still runs at the end is killed."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    queue = JobQueue(tmp_path / "ä b" / "reelsmith-queue")
    yield queue
    queue.end_work()
    while running := [job for job in queue.jobs() if job.state == RUNNING]:
        queue.stop(running[0].id)


def ask(served: Served, what: str, **form: object) -> int:
    return served.ask(f"/queue/{what}", "POST", urlencode(form), Origin=served.url).status


SCRIPT = str(ROOT / "wan_train_network.py")


LAUNCH = ["-P", "-m", "accelerate.commands.launch"]
TWO = ["--quiet", "--num_processes=2", "--gpu_ids", "0,1"]


@pytest.mark.parametrize(
    ("line", "program"),
    [
        ("python wan_train_network.py --seed 1", [SCRIPT, "--seed", "1"]),
        (f"python3 '{SCRIPT}' --a 'b; c' \"it's\"", [SCRIPT, "--a", "b; c", "it's"]),
        ("wan_train_network.py \\\n  --a 1", [SCRIPT, "--a", "1"]),
        ("reelsmith train wan --a", [SCRIPT, "--a"]),
        ("python reelsmith.py train wan", [SCRIPT]),
        ("python tools/download.py", [str(ROOT / "tools" / "download.py")]),
        ("accelerate launch -m reelsmith.wan_train_network --a", [*LAUNCH, SCRIPT, "--a"]),
        (f"accelerate launch {' '.join(TWO)} wan_train_network.py --quiet", [*LAUNCH, *TWO, SCRIPT]),
    ],
)
def test_a_line_of_ours_becomes_a_program(line: str, program: list[str]) -> None:
    found = find_program(split_arguments(line), Path.cwd())[1]

    assert found[: 1 + len(program)] == [sys.executable, *program]


REJECTED = (
    ("bash run.sh", "'bash'"),
    ("python -m http.server", "'-m http.server'"),
    ("python -c 'import os'", "'-c'"),
    ("python", "''"),
    ("python /tmp/wan_train_network.py", "'/tmp/wan_train_network.py'"),
    ("python ../wan_train_network.py", "'../wan_train_network.py'"),
    ("python wan_train_netwrk.py", "Did you mean wan_train_network.py?"),
    ("python quickstart.py", "'quickstart.py'"),
    ("python modules/version.py", "'modules/version.py'"),
    ("reelsmith trian wan", "'reelsmith trian wan'"),
    ("reelsmith --extensions glow train wan", "reelsmith.py --extensions glow browser"),
    ("python reelsmith.py --extensions", "'reelsmith.py --extensions'"),
    ("accelerate launch --no_python bash", "--no_python"),
    ("accelerate launch -m http.server", "'-m http.server'"),
    ("accelerate launch --num_processes 2", "''"),
    ("accelerate config", "'accelerate'"),
    *(
        (f"accelerate launch {argv} wan_train_network.py", "on this machine")
        for argv in (
            "--main_process_ip 10.0.0.9",
            "--main-process-ip=10.0.0.9",
            "--main_process_i 10.0.0.9",
            "--rdzv_backend c10d",
            "--rdzv_backend=etcd",
            "--rdzv_conf is_host=0",
            "--num_machines 2",
            "--num_machines=02",
            "--machine_rank 1",
            "--main_process_port http://x",
            "--config_file stranger.yaml",
            "--use_deepspeed",
            "--deepspeed_config_file stranger.json",
            "--deepspeed_hostfile hosts",
            "--mpirun_hostfile hosts",
            "--tpu --tpu_cluster",
            "--aws_access_key_id x",
            "--log_dir /tmp/x",
            "--multi_gpu=x",
            "--num_processes --rdzv_backend=c10d",
            "--gpu_ids --config_file=x",
            "--quiet --same_network --num_processes 2 --module",
        )
    ),
    ("python wan_train_network.py --dit 'x", "No closing quotation"),
    ("python wan_train_network.py --dit 'a\0b'", "the character NUL"),
    ("python wan_train_network.py --dit '\ud800'", "half a character"),
    ("ü" * 100, "is not a command of this program"),
    ("x" * 300, "is not a command of this program"),
    (f"python {'x' * 300}.py", "is not a command of this program"),
    (f"reelsmith {'ü' * 300}", "is not a command of this program"),
    (r"python tools\compare.py", r"\c in 'python tools"),
    (r"python wan_train_network.py --dit C:\models\x.safetensors", "Write / between folders"),
    *((f"python wan_train_network.py {sign}x", f"'{sign}'") for sign in ";&|>$`~*"),
)


@pytest.mark.parametrize(("line", "word"), REJECTED)
def test_anything_else_is_refused_by_name(line: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as rejection:
        find_program(split_arguments(line), tmp_path)

    assert word in str(rejection.value)


def test_a_job_may_name_the_extensions_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(EXTENSIONS, "half, glow")

    found = find_program(
        split_arguments("python reelsmith.py --extensions glow train wan --glow 1"), tmp_path
    )
    with pytest.raises(OptionError, match="^drift: .* --extensions half,glow,drift browser"):
        find_program(split_arguments("reelsmith --extensions glow,drift train wan"), tmp_path)

    assert found[1] == [sys.executable, SCRIPT, "--glow", "1"]


def test_a_home_folder_is_completed_outside_of_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/o'neil")
    monkeypatch.setenv("USERPROFILE", "/home/o'neil")
    argv = split_arguments("reelsmith run ~/cats --x '~/a ~/b' ~ a~/c")
    assert argv[2:] == [f"{Path.home()}/cats", "--x", "~/a ~/b", str(Path.home()), "a~/c"]


def test_only_accelerates_options_of_one_machine_are_taken(tmp_path: Path) -> None:
    """Each of accelerate's options is tried, with a value that it takes."""
    options = [action for action in launch_command_parser()._actions if action.option_strings]
    taken = set()
    for action in options:
        value = [] if action.nargs == 0 else [str((action.choices or ["1"])[0])]
        for flag in action.option_strings:
            with contextlib.suppress(OptionError):
                find_program(["accelerate", "launch", flag, *value, "wan_train_network.py"], tmp_path)
                taken.add(flag)

    assert len(options) > 80
    assert taken == {
        *("--quiet", "--multi_gpu", "--cpu", "--same_network", "--num_processes", "--max_restarts"),
        *("--num_cpu_threads_per_process", "--num_machines", "--main_process_port", "--gpu_ids"),
        "--mixed_precision",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reelsmith browser", "browser runs until somebody ends it"),
        ("python tools/run_browser.py x --work", "browser runs until somebody ends it"),
        (
            "python wan_generate_video.py --interactive --dit x",
            "--interactive asks for prompts in a terminal",
        ),
        ("python wan_generate_video.py --interact", "--interact asks for prompts in a terminal"),
        ("reelsmith new clips", "Pass --family, and --task"),
        ("reelsmith new nowhere --family wan", "folder nowhere: no such folder"),
        ("reelsmith new clips --famly wan --family wan", "Unknown option --famly"),
        ("reelsmith run", "folder that `new` described"),
        ("python gen_img.py --prompt x", "--ckpt is missing"),
        ("python gen_img.py --prompt x --ckpt no.safetensors", "--ckpt no.safetensors: no such file"),
        ("python tools/download.py --famly wan", "Did you mean --family?"),
        ("convert_lora.py --input no.safetensors --output y.safetensors --target other", "no such file"),
        (
            "wan_generate_video.py --task t2v-1.3B --prompt x --save_path y --dit no.safetensors",
            "--dit no.safetensors: no such file",
        ),
    ],
)
def test_what_cannot_end_or_begin_is_refused_when_it_is_added(
    line: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    with pytest.raises(OptionError) as rejection:
        check_options(split_arguments(line), tmp_path)
    assert message in str(rejection.value)
    assert "--help lists all options" not in str(rejection.value)  # a hint for a terminal


@pytest.mark.parametrize("line", ["reelsmith browser", "python wan_generate_video.py --interactive"])
def test_a_line_by_hand_that_never_ends_does_not_begin(line: str, queue: JobQueue) -> None:
    queue.folder.mkdir(parents=True)
    (queue.folder / QUEUE).write_text(f"{line}\n{shlex.join(SHORT)}\n", encoding="utf-8")
    with serve_runs(queue.folder.parent) as served:
        assert "It will be refused: " in served.ask("/queue").text
    queue.begin_work()
    try:
        refused, _ = wait_for_states(queue, DIED, FINISHED)
    finally:
        queue.end_work()
    assert "a job has none" in refused.last_lines() or "all later jobs" in refused.last_lines()


@pytest.mark.parametrize(
    "line",
    [
        "reelsmith browser --export run.html",
        "reelsmith browser --help",
        "reelsmith new clips --family wan --task t2v-1.3B",
        "python tools/download.py --family wan --task t2v-1.3B --to models",
        "python gen_img.py --prompt x --ckpt ckpt.safetensors",
        "python lora_post_hoc_ema.py a.safetensors ckpt.safetensors --output_file b.safetensors",
    ],
)
def test_what_can_begin_is_taken_and_nothing_is_done_yet(line: str, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("ckpt", "a"):
        (tmp_path / f"{name}.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    check_options(split_arguments(line), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_job_may_read_what_jobs_before_it_write(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    made = "python convert_lora.py --input a.safetensors --output b.safetensors --target other"
    line = "python convert_lora.py --input b.safetensors --output y.safetensors --target other"
    strange = line.replace("b.safe", "nowhere.safe")
    with serve_runs(queue.folder.parent) as served:
        assert ask(served, "add", line=line) == 422
        assert ask(served, "add", line=f"{made}\n{line}") == 303
        assert ask(served, "add", line=line) == 303
        assert ask(served, "add", line=strange) == 422
    assert len(queue.jobs()) == 3


def test_a_queue_that_was_started_goes_on_with_the_next_server(queue: JobQueue) -> None:
    queue.add(SHORT, ROOT)
    queue.begin_work()
    wait_for_states(queue, FINISHED)
    queue.end_work()  # as the server does at its end
    queue.add(SHORT, ROOT)

    later = JobQueue(queue.folder)
    assert reopen_queue(later)
    wait_for_states(queue, FINISHED, FINISHED)
    assert not reopen_queue(JobQueue(queue.folder))  # one server runs it
    later.end_work(pauses=True)

    assert not reopen_queue(JobQueue(queue.folder))
    typed = JobQueue(queue.folder)
    typed.begin_work(stays_open=False)  # with --work
    typed.end_work()
    assert not queue.is_open


def test_a_run_of_no_folder_is_refused_when_it_is_added(tmp_path: Path) -> None:
    (tmp_path / "clips ü").mkdir()
    check_options(split_arguments("reelsmith run 'clips ü' --download"), tmp_path)
    with pytest.raises(OptionError, match="there is no such folder in .* Pass its absolute path"):
        check_options(split_arguments("reelsmith run clips"), tmp_path)


@pytest.mark.slow_cases("accelerate launch wan_train_network.py")
@pytest.mark.parametrize("line", ["wan_train_network.py --sed 1", "accelerate launch wan_train_network.py"])
def test_no_module_is_taken_from_the_folder_of_a_job(line: str, tmp_path: Path) -> None:
    for name in ("runpy", "argparse", "json", "accelerate"):
        (tmp_path / f"{name}.py").write_text("open('it ran', 'w').close()", encoding="utf-8")
    with pytest.raises(OptionError):
        check_options(split_arguments(line), tmp_path)
    if "accelerate" in line:
        program = find_program(split_arguments(line), tmp_path)[1]
        subprocess.run(program, cwd=tmp_path, capture_output=True)
    assert not (tmp_path / "it ran").exists()


def test_pages_refuse_and_show_lines_that_are_no_jobs(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        message = served.ask("/queue/add", "POST", urlencode({"line": "bash x"}), Origin=served.url)
        assert (message.status, "&#39;bash&#39; is not a command" in message.text) == (422, True)
        assert not (tmp_path / "reelsmith-queue" / QUEUE).exists()
        (tmp_path / "reelsmith-queue").mkdir(exist_ok=True)
        (tmp_path / "reelsmith-queue" / QUEUE).write_text("bash x\n", encoding="utf-8")
        assert "It will be refused: &#39;bash&#39;" in served.ask("/queue").text
        for what in ("up", "stop", "retry", "remove"):
            assert ask(served, what, id="1" * 5000) == 404
        assert ask(served, "work") == 303
        wait_for(lambda: "exit code 2" in served.ask("/queue").text)
        assert ask(served, "pause") == 303


def test_lines_are_edited_by_hand_moved_and_removed_while_comments_stay(tmp_path: Path) -> None:
    text = "# first these\npython convert_lora.py --input a\n\npython convert_lora.py --input b\n# then\n"
    file = tmp_path / "reelsmith-queue" / QUEUE
    with serve_runs(tmp_path) as served:
        file.parent.mkdir()
        file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        line = "python convert_lora.py --help 'ü; c'\nreelsmith metaview --help d"
        assert ask(served, "add", line=line) == 303
        queue = JobQueue(file.parent)
        named = {job.id: job.argv[-1] for job in queue.jobs()}
        assert named == {1: "a", 2: "b", 3: "ü; c", 4: "d"}
        assert [ask(served, "up", id=3), ask(served, "down", id=1), ask(served, "down", id=4)] == [303] * 3
        assert [job.id for job in queue.jobs()] == [3, 1, 2, 4]
        assert ask(served, "remove", id=2) == 303
        first, _, blank, a, then, d = file.read_text(encoding="utf-8").splitlines()
        assert (first, blank, a, then) == ("# first these", "", "python convert_lora.py --input a", "# then")
        file.write_text("\n".join([first, d, "python convert_lora.py"]), encoding="utf-8")
        assert [(job.id, job.state) for job in queue.jobs()] == [(4, WAITING), (5, WAITING)]
        for what, number in (("up", 9), ("stop", 4), ("retry", 4), ("remove", "x"), ("nothing", 4)):
            assert ask(served, what, id=number) in (404, 422)


def test_jobs_run_one_after_another_and_one_that_died_shows_its_last_lines(queue: JobQueue) -> None:
    numbers = [queue.add(argv, ROOT) for argv in (SHORT, ["convert_lora.py", "--bogus"], SHORT)]
    queue.begin_work()

    jobs = wait_for_states(queue, FINISHED, DIED, FINISHED)

    assert [job.id for job in jobs] == numbers
    born = [(job.process or {})["born"] for job in jobs]
    assert born == sorted(born)
    assert jobs[1].code == 2
    assert "Unknown option --bogus" in jobs[1].last_lines()
    jobs[1].log.write_text(
        "".join(f"line {count}\rat {count}\x1b[1m\n" for count in range(999)), encoding="utf-8"
    )
    with serve_runs(queue.folder.parent) as served:
        page = served.ask("/queue").text
    assert page.count("at 9") == 20
    assert "at 979\\x1b[1m" in page
    assert "at 978" not in page


def start_browser(folder: Path) -> subprocess.Popen[str]:
    """Start a browser of its own that works through the queue of a folder."""
    command = [sys.executable, str(ROOT / "tools" / "run_browser.py"), str(folder), "--work"]
    browser = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**QUIET, **os.environ}
    )
    assert browser.stdout is not None
    assert browser.stdout.readline().startswith("http://")
    return browser


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signal of this kind")
def test_a_queue_goes_on_after_its_browser_was_killed(queue: JobQueue, lasting: list[str]) -> None:  # noqa: F811
    for argv in (SHORT, lasting, SHORT):
        queue.add(argv, ROOT)
    browser = start_browser(queue.folder.parent)
    try:
        job = wait_for_states(queue, FINISHED, RUNNING, WAITING)[1]
        wait_for(lambda: "Apache-2.0" in job.last_lines(), job.last_lines)
        assert queue.worker == "elsewhere"
        with pytest.raises(OutputError, match="another browser"):
            queue.begin_work()
        again = run_python(ROOT / "tools" / "run_browser.py", queue.folder.parent, "--work", check=False)
        assert_user_error(again, "another browser runs the jobs")
    finally:
        browser.kill()
        browser.communicate()
    assert (job.process or {})["number"] in psutil.pids()
    assert (states(queue), queue.worker) == ([FINISHED, RUNNING, WAITING], "")

    browser = start_browser(queue.folder.parent)
    try:
        time.sleep(2)
        assert states(queue) == [FINISHED, RUNNING, WAITING]
        queue.stop(job.id)
        wait_for_states(queue, FINISHED, STOPPED, FINISHED)
    finally:
        browser.send_signal(signal.SIGINT)
        assert browser.wait(PATIENCE) == 0
    assert queue.worker == ""


def test_a_job_does_not_begin_if_the_browser_is_killed_before_it_noted_it(tmp_path: Path) -> None:
    waiting = prepare_process(tmp_path / "1.log")
    assert waiting.stdin is not None
    waiting.stdin.close()  # as the death of the browser does

    assert waiting.wait(PATIENCE) == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "1.log"]
    assert (tmp_path / "1.log").read_bytes() == b""


def test_read_only_shows_the_queue_without_buttons(queue: JobQueue) -> None:
    queue.add(SHORT, ROOT)
    with serve_runs(queue.folder.parent, read_only=True) as served:
        page = served.ask("/queue").text
    assert "tools/download.py" in page
    assert not [part for part in ("<button", "<textarea") if part in page]


def test_a_damaged_list_is_named(queue: JobQueue) -> None:
    queue.add(SHORT, ROOT)
    job = {"id": 1, "line": "python x.py", "folder": ".", "process": None, "stops": 0}
    wrong = [("id", "../../x"), ("id", -1), ("line", None), ("folder", 5), ("process", "x"), ("stops", [])]
    rows = [{"name": 1}, 5, *({**job, key: value} for key, value in wrong)]
    texts = [json.dumps({"last": 1, "worker": None, "jobs": [row]}) for row in rows]
    tops = [("last", "x"), ("last", 10**20), ("worker", [5])]
    texts += [json.dumps({"last": 1, "worker": None, "jobs": [], key: value}) for key, value in tops]
    for text in ("{", "[]", "[" * 100_000, *texts):
        (queue.folder / STATE).write_text(text, encoding="utf-8")
        with pytest.raises(OutputError, match="jobs.json is damaged"):
            queue.jobs()
    with serve_runs(queue.folder.parent) as served:
        assert (served.ask("/queue").status, ask(served, "remove", id=1)) == (500, 422)
    (queue.folder / STATE).unlink()
    for text in ("python x.py\n" * 1001, "x" * 100_001):
        (queue.folder / QUEUE).write_text(text, encoding="utf-8")
        with pytest.raises(OutputError, match="at most 1,000 lines of 100,000 characters"):
            queue.jobs()
    (queue.folder / QUEUE).unlink()


@pytest.mark.slow_cases(
    "python wan_train_network.py --dataset_confg x.toml-Did you mean --dataset_config?",
    "wan_generate_video.py --save_path x --prompt a --infer_steps x---infer_steps",
)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python wan_train_network.py --dataset_confg x.toml", "Did you mean --dataset_config?"),
        (
            "accelerate launch --num_processes 1 zimage_cache_latents.py --vae x --dataset_config no.toml",
            "no.toml",
        ),
        ("wan_generate_video.py --save_path x --prompt a --infer_steps x", "--infer_steps"),
    ],
)
def test_options_are_checked_when_a_line_is_added_or_edited(line: str, message: str, queue: JobQueue) -> None:
    queue.folder.parent.mkdir()
    with serve_runs(queue.folder.parent) as served:
        answer = served.ask("/queue/add", "POST", urlencode({"line": line}), Origin=served.url)
        assert (answer.status, message in answer.text, "Traceback" in answer.text) == (422, True, False)
        assert queue.jobs() == []
        queue.add(["convert_lora.py", "--input", "x"], ROOT)
        answer = served.ask("/queue/edit", "POST", urlencode({"id": 1, "line": line}), Origin=served.url)
        assert (answer.status, message in answer.text) == (422, True)
        assert ask(served, "edit", id=1, line="python merge_lora.py --help") == 303
        assert [job.line for job in queue.jobs()] == ["python merge_lora.py --help"]
        assert ask(served, "edit", id="1" * 5000, line="python merge_lora.py --help") == 404


@pytest.mark.slow
def test_the_page_is_worked_with_keys_and_keeps_what_is_typed(queue: JobQueue) -> None:
    for name in "abc":
        queue.add(["convert_lora.py", "--input", name], ROOT)
    with serve_runs(queue.folder.parent) as served, open_page(f"{served.url}/") as page:
        page.click("text=Queue")
        page.wait_for_url("**/queue")  # until its scripts listen
        order = "[...document.querySelectorAll('.job')].map(one => one.id).join()"
        page.focus("#down1")
        for expected in ("j2,j1,j3", "j2,j3,j1"):
            page.keyboard.press("Enter")
            wait_until(page, f"{order} === '{expected}'")
            assert page.evaluate("document.activeElement.id") == "down1"
        page.fill("#words", "bash x")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#said >> text=/bash.* is not a command/")
        page.evaluate("htmx.trigger(document.body, 'fresh')")
        page.wait_for_timeout(500)
        assert page.input_value("#words") == "bash x"
        page.fill("#words", "python tools/download.py --list")
        page.click(".add button")
        wait_until(page, f"{order} === 'j2,j3,j1,j4'")
        wait_until(
            page,
            "document.getElementById('words').value === '' && !document.getElementById('said').innerText"
            " && document.getElementById('added').innerText.startsWith('Added: it waits above.')",
        )
        page.click("text=Start the queue")
        page.wait_for_selector("text=Pause the queue")
        wait_until(page, "ask().then(() => document.querySelectorAll('.died, .finished').length === 4)")
        page.click("text=Pause the queue")
        page.wait_for_selector("text=paused")
        assert [error for error in page.problems if "422" not in error] == []


def test_who_removes_a_job_stays_among_the_jobs(queue: JobQueue) -> None:
    for name in ("a", "b"):
        queue.add(["convert_lora.py", "--input", name], ROOT)
    with serve_runs(queue.folder.parent) as served, open_page(f"{served.url}/queue") as page:
        page.focus("#remove1")
        for expected in ("remove2", "work"):
            page.keyboard.press("Enter")
            wait_until(page, f"document.activeElement.id === '{expected}'")
        assert page.problems == []
    assert queue.jobs() == []


def test_an_added_line_is_begun_from_where_it_was_added(queue: JobQueue) -> None:
    with serve_runs(queue.folder.parent, queue=queue) as served, open_page(f"{served.url}/queue") as page:
        page.fill("#words", "python tools/download.py --list")
        page.click(".add button")
        page.get_by_text("Added: it waits above. The queue is paused.").wait_for()
        page.get_by_role("button", name="Start it now").click()
        page.get_by_role("button", name="Pause the queue").wait_for()
        assert page.locator("#begin").is_hidden()
        wait_until(page, "document.activeElement.id === 'words'")
        wait_until(page, "ask().then(() => document.querySelectorAll('.finished').length === 1)")
        wait_until(page, "document.getElementById('added').innerText === ''")
        assert page.locator("#jobs").count() == 1
        assert page.problems == []
    queue.end_work()


def training_words(cached: Path, output: Path, repeats: int, *options: object) -> list[str]:  # noqa: F811
    """A training of the pocket model that saves after each step, which is each clip so many times."""
    text = (cached / "dataset.toml").read_text(encoding="utf-8").replace("batch_size = 16", "batch_size = 1")
    output.mkdir()
    text = text.replace("num_repeats = 4", f"num_repeats = {repeats}")
    (output / "dataset.toml").write_text(text, encoding="utf-8")
    learner = (
        "--sdpa --network_module networks.lora_wan --network_dim 4 --learning_rate 1e-2 --seed 3 "
        "--output_name x --timestep_sampling shift --discrete_flow_shift 3 "
        "--max_data_loader_n_workers 0 --save_every_n_steps 1 --save_state --gradient_accumulation_steps 999"
    )
    places = ("--dataset_config", output / "dataset.toml", "--output_dir", output)
    argv = (*model_options(POCKET), *IN_FLOAT32, *learner.split(), *places, *options)
    return ["python", "wan_train_network.py", *map(str, argv)]


@pytest.mark.slow
def test_a_training_saves_when_it_is_stopped_and_goes_on_when_it_is_retried(
    queue: JobQueue,
    cached: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    queue.add(training_words(cached, output, 1, "--max_train_steps", 4), ROOT)
    queue.begin_work()
    wait_for((output / "x-step00000001.safetensors").exists, queue.jobs()[0].last_lines)
    with serve_runs(queue.folder.parent, tmp_path) as served:
        page = served.ask("/queue").text
        assert f'<a href="{served.of("x")}">x</a> · step' in page

    queue.stop(1)

    (job,) = wait_for_states(queue, STOPPED)
    assert job.code == 0
    assert "continue with --resume" in job.last_lines()
    assert not (output / "x.safetensors").exists()
    queue.retry(1)
    (job,) = wait_for_states(queue, FINISHED)
    assert job.argv[-2:] == ["--resume", "latest"]
    assert "Resuming from" in job.log.read_text(encoding="utf-8")
    assert (output / "x.safetensors").exists()


@pytest.mark.slow
def test_a_job_that_is_stopped_twice_ends_now(
    queue: JobQueue,
    cached: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    queue.add(training_words(cached, tmp_path / "out", 8, "--max_train_steps", 9), ROOT)
    queue.begin_work()
    (job,) = queue.jobs()
    wait_for((tmp_path / "out" / "x-step00000001.safetensors").exists, job.last_lines)
    processes = psutil.Process((queue.jobs()[0].process or {})["number"]).children(recursive=True)
    queue.stop(1)
    wait_for(lambda: "everything will be saved" in job.last_lines(), job.last_lines)

    queue.stop(1)

    assert wait_for_states(queue, STOPPED)[0].code is None
    assert processes
    wait_for(lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes))
    assert not (tmp_path / "out" / "x-step00000002.safetensors").exists()


class Fields(HTMLParser):
    """What a page holds: attributes of all elements, and the fields of each form that posts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.values += named.values()
        if tag == "form" and "hx-post" in named:
            self.forms.append({})
        if tag == "input" and self.forms:
            self.forms[-1][named.get("name", "")] = named.get("value", "")


def write_command(folder: Path, line: str) -> None:
    """Write a run in `folder`/output whose history has this command, typed in `folder`."""
    places = {"written_in": str(folder / "output"), "working_folder": str(folder)}
    history = write_run(folder / "output", "x", changed=[["output_dir", "output"]], **places)
    with history.open("a", encoding="utf-8") as file:
        row = {"step": 6, "commands": [["Copy", line, line, ""]]}
        file.write(json.dumps(row) + "\n")


def test_a_command_with_paths_is_queued_from_the_page_of_its_run_as_it_is_and_runs(
    queue: JobQueue, tmp_path: Path
) -> None:
    folder = tmp_path / "Bilder von Jörg & Co"
    folder.mkdir()
    page = folder / "it's a page.html"
    page.write_text('<meta name="generator" content="reelsmith">', encoding="utf-8")
    line = shlex.join(["python", "tools/share_page.py", str(page), "--output", "copies/made ü.html"])
    (folder / "copies").mkdir()
    write_command(folder, line)
    with serve_runs(folder / "output", queue=queue) as served:
        [form] = [form for form in Fields(served.ask(served.of("x")).text).forms if "line" in form]
        assert form["line"] == line
        assert ask(served, "add", **form) == 303
        assert [(job.line, job.folder) for job in queue.jobs()] == [(line, str(folder))]
        queue.start_next()
        wait_for_states(queue, FINISHED)
    assert (folder / "copies" / "made ü.html").exists()


def test_no_page_has_the_marks_of_private_text_where_they_would_be_text(tmp_path: Path) -> None:
    prompt = "a cat --i '/home/me/a b/start.png'"
    write_command(tmp_path, f"python wan_generate_video.py --prompt '{prompt}' --dit /models/x.safetensors")
    (run,) = tmp_path.glob("output/*-history.jsonl")
    with run.open("a", encoding="utf-8") as file:
        row = {"step": 6, "samples": "000006", "files": {"0": "x_1.png"}, "prompts": {"0": prompt}}
        file.write(json.dumps(row) + "\n")
    with serve_runs(tmp_path) as served:
        ask(served, "add", line="python tools/share_page.py /home/me/x.html --help")
        more = urlencode({"run": served.of("x").split("/")[2], "more": prompt})
        draft = urlencode({"line": "python /home/me/x.py"})
        for address in ("/", served.of("x"), f"/compare?{more}", f"/queue?{draft}", "/datasets"):
            text = served.ask(address).text
            assert not [value for value in Fields(text).values if "<!--" in value], address
            for area in re.findall(r"<textarea[^>]*>(.*?)</textarea>", text, re.DOTALL):
                assert "<!--" not in area, address


def test_with_read_only_no_page_posts(tmp_path: Path) -> None:
    write_command(tmp_path, "python wan_generate_video.py --dit x --prompt x --save_path output/made")
    with serve_runs(tmp_path, read_only=True) as served:
        run = served.of("x").split("/")[2]
        for address in ("/", served.of("x"), f"/compare?run={run}&more=a+dog", "/queue", "/datasets"):
            text = served.ask(address).text
            assert "hx-post" not in text, address
            assert 'method="post"' not in text.lower(), address


def test_a_word_of_300_letters_in_the_text_file_shuts_no_page(tmp_path: Path) -> None:
    folder = tmp_path / "reelsmith-queue"
    folder.mkdir()
    lines = ["x" * 300, f"python {'y' * 300}.py", "python tools/compare.py", "python download.py"]
    (folder / QUEUE).write_text("\n".join(lines), encoding="utf-8")
    write_run(tmp_path)
    with serve_runs(tmp_path) as served:
        page = served.ask("/queue")
        assert (page.status, page.text.count("is not a command of this program")) == (200, 2)
        assert ask(served, "add", line="z" * 300) == 422
        assert served.ask("/compare").status == 200


def test_a_line_may_begin_with_the_folder_of_its_command(queue: JobQueue, tmp_path: Path) -> None:
    folder = tmp_path / "Jo's clips"
    folder.mkdir()
    line = f"cd {shlex.quote(str(folder))} && python tools/download.py --list"
    with serve_runs(tmp_path, queue=queue) as served:
        assert ask(served, "add", line=line) == 303
        assert ask(served, "add", line="cd 'no such' && python tools/download.py --list") == 422
        assert ask(served, "add", line=line.replace(" &&", ";")) == 422
        assert ask(served, "add", line=line.replace("python tools/download.py", "rm -rf x")) == 422
        [job] = queue.jobs()
        assert (job.argv, job.folder, job.problem) == (SHORT, str(folder), "")
        with (queue.folder / QUEUE).open("a", encoding="utf-8") as file:
            file.write(f"{line}\ncd {'x' * 300} && python download.py\ncd nowhere && python download.py\n")
        first, typed, long, nowhere = queue.jobs()
        assert [(one.argv, one.folder) for one in (first, typed)] == [(SHORT, str(folder))] * 2
        assert all("there is no such folder" in one.problem for one in (long, nowhere))
        assert served.ask("/queue").status == 200
        queue.edit(typed.id, f"cd '{tmp_path}' && python tools/download.py --list")
        assert queue.jobs()[1].folder == str(tmp_path)


def test_a_paused_queue_says_so_and_a_job_that_ended_shows_what_it_printed(
    queue: JobQueue, tmp_path: Path
) -> None:
    write_command(tmp_path, "python tools/download.py --list")
    queue.add(SHORT, tmp_path)
    with serve_runs(tmp_path, queue=queue) as served:
        assert "The queue is paused." in served.ask(served.of("x")).text
        page = served.ask("/queue").text
        assert ("paused: jobs wait" in page, 'data-paused="yes"' in page) == (True, True)
        assert "reelsmith run my_clips" in page
        queue.start_next()
        wait_for_states(queue, FINISHED)
        assert "--task TASK --list shows the files of one" in served.ask("/queue").text
        queue.begin_work()
        assert "The queue is paused." not in served.ask(served.of("x")).text


def test_add_without_a_line_says_what_is_missing(queue: JobQueue) -> None:
    with serve_runs(queue.folder.parent, queue=queue) as served, open_page(f"{served.url}/queue") as page:
        page.click(".add button")
        page.get_by_text("Type a command first, such as:").wait_for()
        assert page.locator("#said").bounding_box()["y"] >= 0
        assert [error for error in page.problems if "422" not in error] == []
    assert queue.jobs() == []
