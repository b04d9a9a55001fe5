"""The server shows runs and their files, and nothing else to nobody else."""

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from browser.core.page import list_body_limits
from browser.core.page_access import COOKIE
from browser.core.server import MAX_BYTES, Gate, make_app
from tests.browser.entering import enter
from tests.browser.serving import PNG, Served, serve_runs, write_run
from tests.chromium import open_page
from training.reports.history import History, history_path

TOKEN = "a-secret-word-of-letters"
SECRET = "what nobody may read"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A finished run x and a running one y in a folder, beside which lies a secret."""
    (tmp_path / "secret.txt").write_text(SECRET, encoding="utf-8")
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs", "x", 10)
    write_run(tmp_path / "runs", "y", 4, None)
    with serve_runs(tmp_path / "runs") as served:
        yield served


def test_every_route_answers(served: Served) -> None:
    listed = served.ask("/")
    assert listed.status == 200
    assert listed.text.count('<li id="r') == 2
    assert served.ask("/?text=x&state=finished&family=wan&sort=name").text.count('<li id="r') == 1
    same = {"If_None_Match": listed.headers["etag"]}
    assert (served.ask("/", **same).status, served.ask("/?text=x", **same).status) == (304, 200)
    page = served.ask(served.of("x"))
    assert page.status == 200
    for shown in ("a &lt;b&gt;cat", "finished", "10 of 10", "the disk is nearly full", "--seed"):
        assert shown in page.text
    news = served.ask(served.of("x", "news")).json()
    loss = news["charts"][0]["curves"][0]
    assert (loss["x"], loss["y"][:2]) == ([*range(1, 11)], [1.0, 0.5])
    assert "charts" not in served.ask(served.of("x", f"news?have={quote(news['key'])}")).json()
    part = served.ask(served.of("x", "news?from=3&to=5")).json()["charts"][0]["curves"][0]
    assert part["x"] == [3, 4, 5]
    assert served.ask(served.of("x", "news?from=a")).status == 400
    about = served.ask(served.of("x", "about/x.safetensors"))
    assert "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882" in about.text
    assert served.ask(served.of("x", "sample/x_1.png")).body == PNG
    assert served.ask("/static/browser.js").status == 200
    assert served.ask("/static/htmx.min.js").headers["content-type"].startswith("text/javascript")


def test_a_download_goes_on_where_it_broke_off(served: Served) -> None:
    answer = served.ask(served.of("x", "x.safetensors"), Range="bytes=4-")

    assert (answer.status, answer.body) == (206, b"456789")
    assert answer.headers["content-range"] == "bytes 4-9/10"


def test_only_workflows_of_saved_files_are_given(served: Served, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / "runs" / f"{name}.workflow.json").write_text("{}", encoding="utf-8")

    assert "x.workflow.json" in served.ask(served.of("x")).text
    assert served.ask(served.of("x", "x.workflow.json")).body == b"{}"
    assert served.ask(served.of("x", "y.workflow.json")).status == 404


@pytest.mark.parametrize("kind", ["sample", "save", "stop"])
def test_a_button_writes_the_file_that_the_run_looks_for(served: Served, kind: str, tmp_path: Path) -> None:
    answer = served.ask(served.of("y", "ask"), "POST", f"what={kind}", Origin=served.url)

    assert (answer.status, answer.text[:10]) == (200, "Requested:")
    assert (tmp_path / "runs" / f"y.{kind}").is_file()


def test_only_a_running_training_that_listens_is_asked(served: Served, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "deaf", 3, None, listens=False)
    before = sorted((tmp_path / "runs").iterdir())
    for name in ("x", "deaf"):
        assert served.ask(served.of(name, "ask"), "POST", "what=stop", Origin=served.url).status == 409
        assert 'hx-post="ask"' not in served.ask(served.of(name)).text
    assert served.ask(served.of("y", "ask"), "POST", "what=rm", Origin=served.url).status == 404
    assert 'hx-post="ask"' in served.ask(served.of("y")).text
    with serve_runs(tmp_path / "runs", read_only=True) as careful:
        assert 'hx-post="ask"' not in careful.ask(careful.of("y")).text
    assert sorted((tmp_path / "runs").iterdir()) == before


@pytest.mark.parametrize("headers", [{}, {"Transfer_Encoding": "chunked"}], ids=["whole", "chunked"])
def test_no_route_reads_a_large_request(served: Served, headers: dict[str, str]) -> None:
    # those with limits of their own take files
    for address in {*writing_routes(served)} - list_body_limits().keys():
        large, maximum = ("x" * size for size in (MAX_BYTES + 1, MAX_BYTES))
        assert served.ask(address, "POST", large, Origin=served.url, **headers).status == 413, address
        assert served.ask(address, "POST", maximum, Origin=served.url, **headers).status != 413, address


def writing_routes(served: Served) -> list[str]:
    """Addresses of all routes that can write: of runs, captions, the queue and clips."""
    gate = make_app(served.runs)
    assert isinstance(gate, Gate)
    assert isinstance(gate.app, Starlette)
    routes = [route for route in gate.app.routes if isinstance(route, Route) and "POST" in route.methods]
    assert len(routes) >= 5
    return [re.sub("{.+?}", "x", route.path) for route in routes]


def test_nothing_is_written_with_read_only_or_from_another_origin(served: Served, tmp_path: Path) -> None:
    others = ({}, *({"Origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:1")))
    others = (*others, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"})
    with serve_runs(tmp_path / "runs", read_only=True) as careful:
        for address in (*writing_routes(served), served.of("y", "ask")):
            assert careful.ask(address, "POST", "what=stop", Origin=careful.url).status == 403, address
            for headers in others:
                assert served.ask(address, "POST", "what=stop", **headers).status == 403, (address, headers)
    for headers in others:
        assert served.ask(served.of("y"), **headers).status == (403 if headers else 200)
    assert not (tmp_path / "runs" / "y.stop").exists()


LIES = (
    '{"step": 1, "started": {"model": 3}}',
    '{"step": 2, "memory": 5}',
    '{"step": 3, "commands": [[1]]}',
    '{"step": 4, "samples": "e", "files": {"0": "../../x.png"}, "prompts": {}}',
    '{"step": 1e999, "loss": 1}',
    '{"step": 5, "ended": null, "kind": {}}',
    '{"step": 6, "loss": "x", "rates": 4}',
    '{"step": 6, "loss": [], "seconds": {}}',
    '{"step": 7, "message": [], "level": 1}',
    '{"step": 8, "validation": {"validation/loss": "low"}}',
    '{"step": -9, "saved": "x", "loss": 1e400}',
)


def ways_out(folder: Path) -> list[str]:
    """What follows a run's address in 200 and more tries to leave its folder."""
    ups = r".. %2e%2e %2E. ..%2f.. ..%5c.. %252e%252e ..; ....// %c0%ae%c0%ae .%00."
    ends = "secret.txt /secret.txt runs/../../secret.txt secret.txt%00 secret.txt%00.png"
    starts = ("", "sample/", "about/", "about/sample/", "x.safetensors/")
    secret = str(folder / "secret.txt")
    absolute = [f"{start}{quote(secret, safe=safe)}" for start in starts for safe in ("/", "")]
    others = "/etc/passwd //etc/passwd %2fetc%2fpasswd file:///etc/passwd C:%5cWindows%5cwin.ini ~ "
    others += "x-history.jsonl .x.training.lock sample sample/ about/ about/x-history.jsonl "
    others += "leading_out sample/leading_out.png about/leading_out"
    climbs = itertools.product(starts, ups.split(), ends.split())
    return [*(f"{start}{up}/{end}" for start, up, end in climbs), *absolute, *others.split()]


def test_no_way_leads_out_of_the_folders(served: Served, tmp_path: Path) -> None:
    tries = ways_out(tmp_path)
    assert len(tries) >= 200
    if sys.platform != "win32":
        (tmp_path / "runs" / "x.safetensors").unlink()
        (tmp_path / "runs" / "x.safetensors").symlink_to(tmp_path / "secret.txt")
        (tmp_path / "other").mkdir()
        write_run(tmp_path / "other", "z")
        (tmp_path / "runs" / "linked").symlink_to(tmp_path / "other")
        tries += ["x.safetensors", "about/x.safetensors"]
    start = served.of("x")
    for address in [*(start + one for one in tries), *(f"/static/{one}" for one in tries), *tries[:40]]:
        answer = served.ask(address if address.startswith("/") else f"/{address}")
        assert answer.status in (400, 404), address
        assert not [word for word in (SECRET, "root:", "Traceback") if word in answer.text]
    assert {run.name for run in served.runs.list_all()} == {"x", "y"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "", "["]
)
def test_another_name_is_refused(served: Served, host: str) -> None:
    assert served.ask("/", Host=host).status in (400, 421)


STRANGE_HOSTS = (
    *("[::1%25lo]", "[::1%lo]", "[fe80::1%evil.com]:80", "::1", "[127.0.0.1]", "127.0.0.1]", "[localhost]"),
    *(
        "127.0.0.1:",
        "127.0.0.1:80:80",
        "127.0.0.1:\xb2",
        "127.1",
        "0x7f000001",
        "user@127.0.0.1",
        "localhost.",
    ),
    "localhost,evil.com",
)


@pytest.mark.parametrize("host", STRANGE_HOSTS)
def test_a_host_is_a_name_of_ours_or_an_address_and_nothing_beside_it(served: Served, host: str) -> None:
    assert served.ask("/", Host=host).status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "192.168.1.7"])
def test_addresses_and_this_machine_are_right_names(served: Served, host: str) -> None:
    assert served.ask("/", Host=host).status == 200


def test_without_the_token_nothing_is_shown_and_with_it_a_strict_cookie_is_set(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    with serve_runs(tmp_path, token=TOKEN) as served:
        run = served.of("x")
        wrong = ["", TOKEN, f"{TOKEN[:-1]}", f"{TOKEN}x", "\u00e9", '"', "=;=;"]
        for place in ("/", run, f"{run}news", f"{run}x.safetensors", "/static/browser.js"):
            assert served.ask(place).status == 401
            for word in wrong:
                for name in ("reelsmith", COOKIE):
                    assert served.ask(place, Cookie=f"{name}={quote(word)}").status == 401
                if word != TOKEN:
                    assert served.ask(f"{place}?token={quote(word)}").status == 401
        assert served.ask(f"{run}ask", "POST", "what=stop", Origin=served.url).status == 401

        browser = enter(served, TOKEN)
        opened = served.ask(f"/?token={TOKEN}")

        word, rest = opened.headers["set-cookie"].split("; ", 1)
        assert word.partition("=")[0] == browser.cookie.partition("=")[0]  # the value tells the second
        assert rest == f"HttpOnly; Max-Age=2592000; Path={browser.root}; SameSite=strict"
        assert TOKEN not in opened.text + opened.headers["set-cookie"]
        assert browser.ask(run).status == 200
        assert served.ask(run, Cookie=browser.cookie).status == 401
        assert served.ask(browser.root + run).status == 401


def test_no_script_of_a_text_can_run(served: Served) -> None:
    answer = served.ask("/")

    policy = answer.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in answer.text


# what a history from elsewhere may name as saved or as a sample
HOSTILE = (
    "a.html",
    "a.htm",
    "a.xhtml",
    "a.svg",
    "a.xml",
    "a.js",
    "a.mjs",
    "a.pdf",
    "a.PNG",
    "a",
    "a.png.html",
    "a.css",
)


def test_only_samples_are_shown_and_all_else_is_saved(tmp_path: Path) -> None:
    for path in (
        tmp_path / "x.txt",
        *((tmp_path / place / name) for place in ("", "sample") for name in HOSTILE),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("<script>alert(1)</script>", encoding="utf-8")
    history = History(history_path(tmp_path, "x"), 1)
    history.add(2, samples="000002", files=dict(enumerate(["a.png", *HOSTILE])), prompts={"0": "a"})
    for name in HOSTILE:
        history.add(2, saved=name)
    history.flush()
    (tmp_path / "sample" / "a.png").write_bytes(PNG)
    with serve_runs(tmp_path) as served:
        run = served.of("x")
        assert served.ask(f"{run}sample/a.png").headers["content-type"] == "image/png"
        for name in (*HOSTILE, *(f"sample/{name}" for name in HOSTILE)):
            answer = served.ask(run + name)
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/octet-stream"
            assert answer.headers["content-disposition"].startswith("attachment")
            assert answer.headers["content-security-policy"].startswith("sandbox;")


def test_nothing_of_a_hostile_run_runs_in_a_browser(tmp_path: Path) -> None:
    """A page beside a history would act for the user in this origin: here it adds a job to the queue."""
    act = "fetch('/queue/add', {method: 'POST', body: new URLSearchParams({line: 'python x.py'})})"
    (tmp_path / "sample").mkdir()
    (tmp_path / "a.js").write_text(act, encoding="utf-8")
    (tmp_path / "sample" / "a.html").write_text('<script src="../a.js"></script>', encoding="utf-8")
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" onload="{act}"><script href="../a.js"/></svg>'
    (tmp_path / "sample" / "a.svg").write_text(drawing, encoding="utf-8")
    history = History(history_path(tmp_path, "x"), 1)
    history.add(2, samples="000002", files={"0": "a.html", "1": "a.svg"}, prompts={"0": "<b onclick=x>"})
    history.add(2, saved="a.js")
    history.flush()
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{served.of('x')}") as page:
        for name in ("sample/a.html", "sample/a.svg", "a.js"):
            with page.expect_download():
                page.evaluate("name => { location.href = name }", name)
            added = page.evaluate(
                "name => { const s = document.createElement('script'); s.src = name; "
                "document.head.append(s); return new Promise(r => { s.onload = () => r('ran'); "
                "s.onerror = () => r('refused') }) }",
                name,
            )
            assert added == "refused"
        page.wait_for_timeout(300)
        assert not (tmp_path / "reelsmith-queue").exists()


def test_damaged_and_vanishing_runs_are_answered_without_a_fault(tmp_path: Path) -> None:
    full = write_run(tmp_path, "whole", 200)
    data = full.read_bytes()
    damaged = {f"cut{length}": data[:length] for length in range(0, len(data), len(data) // 7)}
    damaged |= {"zeros": bytes(5000), "nested": data + b"[" * 100_000 + b"\n"}
    big = "9" * 4000
    lines = {
        "point": '"step": 3, "loss": 1.2.3, "seconds": 1.0',
        "points": '"step": 3, "loss": 1, "seconds": 1.2.3, "average": 1.1.1',
        "step": f'"step": {big}, "loss": 1.0',
        "loss": f'"step": 4, "loss": {big}',
        "rate": f'"step": 4, "loss": 1, "rates": {{"a": {big}}}',
        "validation": f'"step": 6, "validation": {{"loss": {big}}}',
        "start": '"step": 0, "started": {"model": "m", "total_steps": 1e308, "changed": [], "unchanged": []'
        ', "listens": 1, "process": {}}',
    }
    damaged |= {name: data + f"{{{line}}}\n".encode() for name, line in lines.items()}
    damaged["lies"] = data + "".join(f"{line}\n" for line in LIES).encode()
    for name, content in damaged.items():
        (tmp_path / f"{name}-history.jsonl").write_bytes(content)
    if sys.platform == "linux":
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9-history.jsonl")).write_bytes(data)
    with serve_runs(tmp_path) as served:
        for run in served.runs.list_all():
            for rest in ("", "news", "sample/whole_1.png", "about/whole.safetensors"):
                answer = served.ask(f"/run/{run.id}/{rest}")
                assert answer.status in ((200, 404) if rest else (200,)), (run.name, rest)
                assert "Traceback" not in answer.text
        assert served.ask("/").text.count('<li id="r') >= len(damaged)
        address = served.of("whole")
        (tmp_path / "sample" / "whole_1.png").unlink()
        assert served.ask(f"{address}sample/whole_1.png").status == 404
        for path in tmp_path.glob("**/*.*"):
            path.unlink()
        for rest in ("", "news", "ask"):
            assert served.ask(f"{address}{rest}").status in (404, 405)
        assert served.ask("/").status == 200


def test_an_address_that_no_page_has_is_answered_with_a_page_and_links(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        answer = served.ask("/nopage")

        assert answer.status == 404
        assert "It does not exist" in answer.text
        assert 'href="/new"' in answer.text
