"""Records of the queue, of background jobs and render jobs, and drafts: files of a stranger start nothing."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.core.server import make_app
from browser.jobs.background_jobs import name_background_job
from browser.jobs.jobs import FOLDER as QUEUE_FOLDER
from browser.runs.runs import Runs
from modules.errors import OutputError
from tests.browser.serving import Served, serve_runs, write_run
from tests.browser.test_safe_clicks import (
    SECRET,
    describe,
    list_addresses,
    list_children,
    list_files,
    save_image,
    wait_for_children,
)
from tests.waiting import wait_for

WAIT_SECONDS = 2.0  # in which a server that starts what it finds would have done so
MAX_SECONDS = 20.0  # of the processor, for an answer
NOBODY = {"machine": 1, "number": 1, "born": 1}  # a process of another machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a run, a described folder, and a module and a script that leave a mark when they run."""
    root = tmp_path / "root"
    write_run(root / "runs", "x", 10)
    for number in range(2):
        save_image(root / "described" / f"{number}.png", 80 * number)
    describe(root / "described")
    for name in ("evil.py", "sitecustomize.py", "wan_generate_video.py", "json.py", "torch.py"):
        code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        (root / name).write_text(code, encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET, encoding="utf-8")
    return root


@pytest.fixture
def bystander() -> Iterator[psutil.Popen]:
    """A process that has nothing to do with the server."""
    process = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def visit_all(served: Served, query: str = "") -> None:
    """Open all pages; none fails or takes long."""
    for address in list_addresses(served, "GET"):
        began = time.process_time()
        answer = served.ask(f"{address}{query}")
        assert answer.status < 500, (address, answer.text[:300])
        assert time.process_time() - began < MAX_SECONDS, address
        assert "Traceback" not in answer.text
        assert SECRET not in answer.text


def press_all(served: Served, **fields: str) -> None:
    """Press all buttons but those that begin to work through the queue."""
    for address in list_addresses(served, "POST"):
        if address.endswith("/work") or "go" in address.rpartition("/")[2]:
            continue
        answer = served.ask(address, "POST", urlencode(fields), Origin=served.url)
        assert answer.status < 500, (address, answer.text[:300])
        assert SECRET not in answer.text


def is_said(text: str) -> bool:
    """Return whether an answer names a file of the queue, and why it cannot be used."""
    return f"{QUEUE_FOLDER}/" in text and "Traceback" not in text


def request(number: int, session: Any, folder: Path, **facts: Any) -> dict[str, Any]:
    """The record of a render job that waits. session: the words of the command that it starts."""
    default = {
        "id": number,
        "title": "wan t2v-1.3B",
        "session": session,
        "command": session,
        "request": {"prompt": "a cat", "options": {}},
        "folder": str(folder),
        "save_path": str(folder / "generated"),
        "created": 1.0,
        "form": {},
        "state": "waiting",
        "reason": "",
        "file": "",
        "process": None,
        "doing": "",
        "done": 0,
        "steps": 0,
        "last_lines": "",
    }
    return default | facts


SESSIONS: tuple[list[Any], ...] = (
    ["python", "evil.py", "--interactive"],
    ["evil.py", "--interactive"],
    [sys.executable, "evil.py", "--interactive"],
    ["python", "-m", "evil", "--interactive"],
    ["sh", "-c", "touch ../ran"],
    ["python", "run_project.py", "described", "--interactive"],
    ["reelsmith", "run", "described"],
    ["accelerate", "launch", "evil.py"],
    ["python", "gen_img.py", "--from_module", "evil.py", "--interactive"],
    ["python", "wan_train_network.py", "--network_module", "evil", "--interactive"],
    ["python", "../evil.py"],
    [],
    [1, None],
)


def test_planted_render_jobs_start_nothing_that_the_page_would_not(root: Path, tmp_path: Path) -> None:
    folder = root / QUEUE_FOLDER / "making"
    folder.mkdir(parents=True)
    for number, session in enumerate(SESSIONS, 1):
        (folder / f"{number}.json").write_text(json.dumps(request(number, session, root)), encoding="utf-8")
    good = ["python", "wan_generate_video.py", "--task", "t2v-1.3B", "--interactive", "--save_path"]
    outside = str(tmp_path / "outside")
    record = request(90, [*good, outside], root, save_path=outside)
    (folder / "90.json").write_text(json.dumps(record), encoding="utf-8")
    before = list_children()
    with serve_runs(root) as served:
        visit_all(served)
        for number in (*range(1, len(SESSIONS) + 1), 90):
            for what in ("again", "cancel", "again"):
                form = urlencode({"id": str(number)})
                served.ask(f"/generate/{what}", "POST", form, Origin=served.url)
        wait_for(
            lambda: not {"waiting", "running"} & {making["state"] for making in read_render_jobs(folder)},
            lambda: str(read_render_jobs(folder)),
        )
        visit_all(served)
        assert list_children() <= before
    assert not (tmp_path / "ran").exists()
    assert list_files(tmp_path / "outside").keys() == {str(tmp_path / "outside" / "secret.txt")}


def read_render_jobs(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.json")
        if path.stem.isdecimal()
    ]


def damaged(content: str) -> list[bytes]:
    """A file of JSON, damaged in many ways."""
    full = content.encode()
    pieces = [full[: len(full) * part // 5] for part in range(5)]
    odd = [b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe\0", bytes(5000), b"[" * 200_000, b'{"a":' * 5000]
    values: list[Any] = [
        None,
        -1,
        10**400,
        1e308,
        "x" * 100_000,
        "\ud800",
        [],
        {},
        [[]],
        True,
        "a\0b",
        "../../x",
        "<b>",
    ]
    row = json.loads(content)
    changed = [json.dumps(row | {name: value}).encode() for name in row for value in values]
    return [*pieces, *odd, *changed, full[:-1] + b',"more":' + b"[" * 50_000]


@pytest.mark.slow_cases("checks")
@pytest.mark.parametrize("kind", ["render jobs", "background jobs", "checks", "jobs", "lines", "drafts"])
def test_damaged_files_break_no_page(root: Path, tmp_path: Path, kind: str) -> None:
    queue = root / QUEUE_FOLDER
    (queue / "logs").mkdir(parents=True)
    (queue / "making" / "drafts").mkdir(parents=True)
    contents: list[tuple[Path, bytes]] = []
    row = {"line": "reelsmith run described --check", "folder": str(root), "process": NOBODY, "stops": 0}
    if kind == "render jobs":
        words = ["python", "evil.py"]
        texts = damaged(json.dumps(request(1, words, root, state="died", reason="it died")))
        contents = [(queue / "making" / f"{place}.json", text) for place, text in enumerate(texts, 1)]
    elif kind in ("background jobs", "checks"):
        name = queue / "logs" / f"{name_background_job('describe', root / 'described')}.json"
        line = row["line"] if kind == "checks" else "reelsmith new x 'y"
        contents = [(name, text) for text in damaged(json.dumps(row | {"line": line}))]
    elif kind == "jobs":
        jobs = json.dumps({"last": 1, "worker": None, "jobs": [{"id": 1, **row}]})
        contents = [(queue / "jobs.json", text) for text in damaged(jobs)]
        rows = [json.loads(text) for text in damaged(json.dumps({"id": 1, **row}))[14:-1]]
        contents += [
            (queue / "jobs.json", json.dumps({"last": 1, "worker": None, "jobs": [each]}).encode())
            for each in rows
        ]
    elif kind == "lines":
        lines = [
            "reelsmith run 'x",
            "run",
            "\0",
            "x" * 200_000,
            "cd '' && run",
            "\\\n" * 5000,
            "reelsmith run\n" * 3000,
        ]
        contents = [(queue / "queue.txt", line.encode()) for line in lines]
    else:
        texts = damaged(json.dumps({"prompt": ["x"], "source": ["run x"], "lora": ["y"], "steps": ["3"]}))
        contents = [
            (queue / "making" / "drafts" / f"{place:016x}.json", text) for place, text in enumerate(texts)
        ]
    is_one_file = len({path for path, _ in contents}) == 1
    pages = ("/new?folder=described", "/", "/queue", "/generate", "/generate/work", "/models")
    before = list_children()
    with serve_runs(root) as served:
        for path, content in contents:
            path.write_bytes(content)
            if is_one_file:
                visit_pages(served, pages, content)
    with serve_runs(root) as served:
        visit_pages(served, pages, b"at the start of a server")
    assert not (tmp_path / "ran").exists()
    assert list_children() <= before


HISTORIES: dict[str, dict[str, Any]] = {  # keys of the rows that have them -> other values
    "sums that overflow": {"loss": 1e308, "seconds": 1e308, "step": 3},
    "opposite infinities": {"loss": -1e308},
    "halves of characters": {"samples": "\ud800", "files": {"0": "\ud800.png"}, "prompts": {"0": "\ud800"}},
    "bytes that are not text": {"files": {"0": "\udc80.png"}, "saved": "\udc80.safetensors"},
    "places that cannot be": {"written_in": "/\ud800", "working_folder": "/a\0b", "model": "\ud800"},
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_strange_history_breaks_no_page(root: Path, kind: str) -> None:
    good = root / "runs" / "x-history.jsonl"
    rows = []
    for line in good.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for part in (row, row.get("started", {})):
            part |= {key: value for key, value in HISTORIES[kind].items() if key in part or part is not row}
        rows += [json.dumps(row)] * 3
    (root / "runs" / "odd-history.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with serve_runs(root) as served:
        for rest in ("", "news", "deeds", "standing"):
            assert served.ask(served.of("odd", rest)).status < 500, rest
        for address in ("/", "/results", "/new", "/generate", "/compare"):
            assert served.ask(address).status == 200, address


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only names that are text")
def test_a_folder_whose_name_is_no_text_is_listed_with_the_reason(root: Path) -> None:
    save_image(root / "alb\udcfcm" / "0.png")
    with serve_runs(root) as served:
        for address in ("/new", "/new/folders", "/", "/datasets"):
            assert served.ask(address).status == 200, address
        text = served.ask("/new").text

    assert "is not UTF-8: rename it" in text
    assert "/new?folder=" in text  # the others are links as before


def visit_pages(served: Served, pages: tuple[str, ...], content: bytes) -> None:
    for address in pages:
        answer = served.ask(address)
        is_fine = answer.status < 500 or is_said(answer.text)
        assert is_fine, (address, content[:200], answer.text[:200])


def test_a_planted_record_ends_no_other_process(root: Path, bystander: psutil.Popen) -> None:
    logs = root / QUEUE_FOLDER / "logs"
    logs.mkdir(parents=True)
    process = {"machine": 1, "number": bystander.pid, "born": round(bystander.create_time())}
    for kind in ("describe", "check"):
        name = name_background_job(kind, root / "described")
        line = "reelsmith new x" if kind == "describe" else "reelsmith run x --check"
        row = {"line": line, "folder": str(root), "process": process, "stops": 0}
        (logs / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")
        (logs / f"{name}.log").write_text("it runs", encoding="utf-8")
    row = {"id": 1, "line": "reelsmith run described", "folder": str(root), "process": process, "stops": 1}
    book = {"last": 1, "worker": None, "jobs": [row]}
    (logs.parent / "jobs.json").write_text(json.dumps(book), encoding="utf-8")
    (logs.parent / "queue.txt").write_text("reelsmith run described\n", encoding="utf-8")
    (logs / "1.log").write_text("it runs", encoding="utf-8")
    (logs.parent / "making").mkdir()
    session = {"server": NOBODY, "process": process}
    (logs.parent / "making" / "session.json").write_text(json.dumps(session), encoding="utf-8")
    with serve_runs(root) as served:
        visit_all(served, "?folder=described")
        press_all(served, folder="described", id="1")
        wait_for_children(bystander)
        assert bystander.status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("place", ["", "logs", "making"])
def test_a_queue_that_is_a_link_is_refused(root: Path, tmp_path: Path, place: str) -> None:
    path = root / QUEUE_FOLDER / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path / "outside")

    with pytest.raises(OutputError, match="is a link to another place"):
        make_app(Runs((root,)))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_the_folder_of_the_queue_write_and_show_nothing(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    queue = root / QUEUE_FOLDER
    names = ["queue.txt", "jobs.json", "logs/1.log", "logs/1.code", "making/making.log", "making/1.json"]
    names += ["making/session.json", "making/.lock", ".lock"]
    for kind in ("describe", "check"):
        name = name_background_job(kind, root / "described")
        names += [f"logs/{name}.{end}" for end in ("log", "json", "code")]
    for name in names:
        (queue / name).parent.mkdir(parents=True, exist_ok=True)
        (queue / name).symlink_to(outside / "secret.txt")
    before = list_files(outside)
    with serve_runs(root) as served:
        for address in list_addresses(served, "GET"):
            answer = served.ask(f"{address}?folder=described")
            assert SECRET not in answer.text, address
        press_all(served, folder="described", id="1", line="reelsmith run described --check")
        served.ask("/queue/work", "POST", "", Origin=served.url)
        time.sleep(WAIT_SECONDS)
        served.ask("/queue/pause", "POST", "", Origin=served.url)
        wait_for_children()
    assert list_files(outside) == before


DRAFT = """
[training]
output_dir = "output"
output_name = "own"
network_module = "networks.lora_wan"
max_train_steps = 2
{training}
[reelsmith]
files = []
commands = [["python", "tools/download.py", "--family", "wan", "--task", "t2v-1.3B", "--to", "models"]]
"""
LAST = ["python", "wan_train_network.py", "--config_file", "run.toml"]
DAILY: tuple[Any, ...] = (
    [["sh", "-c", "touch ../../ran"]],
    [["python", "../evil.py"], LAST],
    [["python", "wan_train_network.py", "--network_module", "evil"]],
)
OTHER: tuple[Any, ...] = (
    [{"a": 1}],
    [["python", "evil.py"], LAST],
    [["python", "-c", "open('../../ran', 'w')"], LAST],
    [
        ["python", "tools/download.py", "--family", "wan", "--task", "t2v-1.3B", ";", "touch", "../../ran"],
        LAST,
    ],
    [["accelerate", "launch", "--config_file", "x", "evil.py"], LAST],
    [["python", "wan_train_network.py", "--optimizer_type", "evil.Optimizer"]],
    [["python", "wan_train_network.py", "--output_dir", "../../outside", "--huggingface_repo_id", "a/b"]],
    "rm -rf /",
    [],
    [[]],
    [[1, 2]],
)
COMMANDS = [
    *(pytest.param(commands, id=str(commands)) for commands in DAILY),
    *(pytest.param(commands, id=str(commands), marks=pytest.mark.slow) for commands in OTHER),
]


@pytest.mark.parametrize("commands", COMMANDS)
def test_a_draft_of_a_stranger_runs_no_command_of_its_own(root: Path, tmp_path: Path, commands: Any) -> None:
    folder = root / "described"
    text = (folder / "run.toml").read_text(encoding="utf-8")
    begin = text.index("commands = ")
    written = json.dumps(commands) if not isinstance(commands, list) or {} not in commands else "[]"
    written = written.replace('{"a": 1}', "{a = 1}")
    (folder / "run.toml").write_text(f"{text[:begin]}commands = {written}\n", encoding="utf-8")
    (folder / "evil.py").write_text((root / "evil.py").read_text(encoding="utf-8"), encoding="utf-8")
    queue = root / QUEUE_FOLDER / "queue.txt"
    before = list_children()
    with serve_runs(root) as served:
        visit_all(served, "?folder=described")
        assert list_children() <= before
        press_all(served, folder="described")
        served.ask("/queue/work", "POST", "", Origin=served.url)
        time.sleep(WAIT_SECONDS)
        wait_for_children()
        served.ask("/queue/pause", "POST", "", Origin=served.url)
    lines = queue.read_text(encoding="utf-8").splitlines() if queue.exists() else []
    begins = f"reelsmith run {folder}", "python tools/caption_dataset.py --dataset_config dataset.toml "
    assert [line for line in lines if not line.startswith(begins)] == []
    assert not (tmp_path / "ran").exists()
    assert list_files(tmp_path / "outside").keys() == {str(tmp_path / "outside" / "secret.txt")}


VALUES = (
    "steps = inf",
    "max_train_epochs = -1",
    "sample_prompts = 3",
    'sample_prompts = "../../outside/secret.txt"',
    'sample_prompts = "/dev/stdin"',
    'dit = "\\u0000"',
    f'dit = "{"x" * 5000}"',
    'vae = ["a", {b = 1}]',
    "t5 = 2020-01-01",
    'task = ""',
    'logging_dir = "~"',
    f"x{'.y' * 5000} = 1",
    f"deep = {'[' * 3000}{']' * 3000}",
)
NAMES = ('"../../outside/x"', '"<b>"', '"a\\u0000b"', '"' + "x" * 5000 + '"', "3", "[]", '""', '"."', '"CON"')
FILES = (
    "",
    "[training]",
    "training = 3",
    "[[training]]",
    "\0",
    "x = ",
    "[reelsmith]\ncommands = 3",
    "a = 1\n" * 40_000,
)


def list_drafts() -> list[bytes]:
    drafts = [DRAFT.format(training=value) for value in VALUES]
    for name in NAMES:
        drafts.append(DRAFT.format(training="").replace('"own"', name))
        drafts.append(DRAFT.format(training="").replace('"output"', name))
        drafts.append(DRAFT.format(training="").replace("files = []", f"files = [{name}, {name}]"))
        drafts.append(DRAFT.format(training="").replace("max_train_steps = 2", f"max_train_steps = {name}"))
        drafts.append(DRAFT.format(training="").replace('"t2v-1.3B"', name))
        drafts.append(DRAFT.format(training="").replace('"models"', name))
    return [text.encode() for text in (*drafts, *FILES)] + [
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf" + drafts[0].encode(),
    ]


@pytest.mark.slow_cases("prompts.txt")
@pytest.mark.parametrize("name", ["run.toml", "dataset.toml", "prompts.txt"])
def test_no_content_of_a_draft_breaks_a_page_or_leads_outside(root: Path, tmp_path: Path, name: str) -> None:
    path = root / "described" / name
    pages = ("/", "/new", "/new?folder=described", "/new/settings?folder=described", "/generate", "/datasets")
    with serve_runs(root) as served:
        for content in list_drafts():
            path.write_bytes(content)
            for address in pages:
                began = time.process_time()
                answer = served.ask(address)
                assert answer.status < 500, (address, content[:300], answer.text[:200])
                assert time.process_time() - began < MAX_SECONDS, (address, content[:300])
                assert SECRET not in answer.text
        if hasattr(os, "mkfifo"):
            path.unlink()
            os.mkfifo(path)
            for address in pages:
                assert served.ask(address).status < 500, address
            path.unlink()
        path.unlink(missing_ok=True)
        path.mkdir()
        for address in pages:
            assert served.ask(address).status < 500, address
    assert list_files(tmp_path / "outside").keys() == {str(tmp_path / "outside" / "secret.txt")}
