"""Markup in names, captions, prompts, messages and settings is shown as text on every page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from browser.jobs.background_jobs import name_background_job
from browser.jobs.jobs import FOLDER as QUEUE_FOLDER
from tests.browser.serving import serve_runs, write_run
from tests.browser.test_safe_clicks import describe, list_addresses, read_controls, save_image
from tests.chromium import open_page
from training.reports.history import History, describe_process, history_path

# what a browser would run, fetch or obey if it were not escaped: in texts, attributes, scripts and templates
EVIL = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>\"'><svg onload=alert(3)>"
    "</title></textarea></pre><b hx-get=/queue hx-trigger=load>{{ 7*7 }}{% raw %}${alert(4)}`&lt;i&gt;"
)
NAME = "<img src=x onerror=alert(1)>\"'&{{7*7}}"  # as much of it as a file's name may hold
MAX_PAGES = 40
# shapes of pictures on the page Generate are its own
SHAPE = "[style^=aspect-ratio]"
OTHERS = f"img[onerror], svg[onload], b[hx-get], script:not([src]), i:not({SHAPE})"
ADDED = f"[...document.querySelectorAll('{OTHERS}')]"
LINKS = "[...document.querySelectorAll('main a, nav a')].map(one => one.pathname + one.search)"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="such names cannot be there")


def write_hostile_run(folder: Path, name: str, ending: str | None) -> None:
    history = History(history_path(folder, name), 1)
    (folder / "sample").mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"model": EVIL, "total_steps": 10, "listens": True, "doing": EVIL}
    changed = [["sample_prompts", EVIL], ["output_dir", EVIL], [EVIL, EVIL], ["dit", EVIL]]
    process = describe_process() if ending is None else {}
    history.add(0, started={**info, "changed": changed, "unchanged": [[EVIL, EVIL]], "process": process})
    typed = f"python wan_generate_video.py --task t2v-1.3B --prompt '{EVIL[:30]}'"
    history.add(0, commands=[[EVIL, typed, typed, EVIL, EVIL]])
    history.add(1, loss=1.0, rates={EVIL: 1e-4}, seconds=1.0)
    history.add(1, samples="000001", files={"0": f"{name}_1.png"}, prompts={"0": EVIL})
    history.add(1, saved=f"{name}.safetensors")
    history.add(1, level="warning", message=EVIL)
    history.add(1, doing=EVIL)
    if ending is not None:
        history.add(1, ended=EVIL, kind=ending)
    history.flush()
    save_image(folder / "sample" / f"{name}_1.png")
    (folder / f"{name}.safetensors").write_bytes(b"0123456789")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root in which all that a page may show is markup."""
    root = tmp_path / "root"
    write_hostile_run(root / NAME, NAME, "bad")
    write_hostile_run(root / "runs", f"{NAME}2", None)
    write_run(root / "runs", "x")
    for folder in (root / f"{NAME}3", root / "described"):
        save_image(folder / f"{NAME}.png")
        (folder / f"{NAME}.txt").write_text(EVIL, encoding="utf-8")
        describe(folder)
        text = (folder / "run.toml").read_text(encoding="utf-8")
        text = text.replace("[training]", f"[training]\nlog_prefix = {json.dumps(EVIL)}")
        text = text.replace('task = "', f'sample_solver = {json.dumps(EVIL)}\ntask = "')
        (folder / "run.toml").write_text(f"# {EVIL}\n{text}", encoding="utf-8")
        (folder / "prompts.txt").write_text(f"{EVIL} --w 64 --h 64\n", encoding="utf-8")
        dataset = (folder / "dataset.toml").read_text(encoding="utf-8")
        dataset = dataset.replace("[general]", f"[general]\ntrigger_word = {json.dumps(EVIL)}")
        (folder / "dataset.toml").write_text(dataset, encoding="utf-8")
    write_records(root)
    tags = PngInfo()
    for name in ("bt_prompt", "bt_seeds", "bt_model_type", "bt_infer_steps", "parameters", "Comment"):
        tags.add_text(name, EVIL)
    (root / "generated").mkdir()
    Image.new("RGB", (8, 8)).save(root / "generated" / f"{NAME}.png", pnginfo=tags)
    return root


def write_records(root: Path) -> None:
    """Write what the queue, background jobs and render jobs say of themselves."""
    logs = root / QUEUE_FOLDER / "logs"
    logs.mkdir(parents=True)
    process = describe_process()
    for kind in ("describe", "check"):
        name = name_background_job(kind, root / "described")
        line = "reelsmith new x" if kind == "describe" else "reelsmith run x --check"
        row = {"line": line, "folder": EVIL, "process": process | {"born": 1}, "stops": 0}
        (logs / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")
        message = f"{EVIL}\n  reelsmith run '{EVIL[:20]}\n  python {EVIL}\n{NAME}.png: {EVIL}\n"
        (logs / f"{name}.log").write_text(message, encoding="utf-8")
        (logs / f"{name}.code").write_text("1", encoding="utf-8")
    (logs.parent / "queue.txt").write_text(f"{EVIL}\npython {EVIL}\n# {EVIL}\n", encoding="utf-8")
    (logs / "1.log").write_text(EVIL, encoding="utf-8")
    making = logs.parent / "making"
    making.mkdir()
    texts = dict.fromkeys(("title", "folder", "save_path", "reason", "file", "doing", "last_lines"), EVIL)
    row = {
        "id": 1,
        **texts,
        "session": [EVIL],
        "command": [EVIL],
        "created": 1.0,
        "state": "died",
        "form": {},
    }
    row |= {"request": {"prompt": EVIL, "options": {"seed": EVIL}}, "process": None, "done": 0, "steps": 0}
    (making / "1.json").write_text(json.dumps(row), encoding="utf-8")


def test_no_page_holds_markup_of_a_name_or_text(root: Path) -> None:
    with serve_runs(root) as served:
        ids = [run.id for run in served.runs.list_all()]
        default = served.of("x").split("/")[2]
        for address in list_addresses(served, "GET"):
            for id in ids if default in address else [default]:
                queries = ["", f"?folder=described&run={id}&command=0"]
                # of which the page Generate takes one for the other
                queries += [f"?run={id}", f"?source=run+{id}"] if address.startswith("/generate") else []
                for query in queries:
                    answer = served.ask(address.replace(default, id) + query)
                    assert answer.status < 500, address
                    if answer.headers.get("content-type", "").startswith("text/html"):
                        assert read_controls(answer.text).running == [], address + query
                        assert "onerror=alert(1)>" not in answer.text, address + query
                        assert "<b hx-get" not in answer.text, address + query


@pytest.mark.slow
def test_nothing_of_a_hostile_root_runs_in_a_browser(root: Path) -> None:
    """All pages that links lead to from the front page, opened in Chromium."""
    with serve_runs(root) as served, open_page(served.url) as page:
        seen: list[str] = []
        waiting = ["/", "/new?folder=described", "/generate", "/models", "/settings", "/queue"]
        while waiting and len(seen) < MAX_PAGES:
            address = waiting.pop(0)
            seen.append(address)
            if page.goto(served.url + address).status >= 400:
                continue
            page.wait_for_timeout(700)  # in which parts are loaded
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            page.wait_for_timeout(100)
            assert page.evaluate(f"{ADDED}.map(one => one.outerHTML)") == [], address
            links = page.evaluate(
                "[...document.querySelectorAll('main a, nav a')].map(one => one.pathname + one.search)"
            )
            waiting += [
                link for link in dict.fromkeys(links) if is_page(link) and link not in [*seen, *waiting]
            ]
        assert len(seen) > 8
        assert [error for error in page.problems if not is_of_missing_file(error)] == []


def is_page(link: str) -> bool:
    """Return whether a link leads to a page, and not to a file that is saved."""
    return link.endswith("/") or "?" in link or link.count("/") == 1


def is_of_missing_file(problem: str) -> bool:
    return problem.startswith("console: Failed to load resource") and "Content Security" not in problem
