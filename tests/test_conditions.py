"""No test depends on where it runs: the clone's name, the account, the load of the machine."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import account
from tests.commands import ROOT

FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "golden")
MIN_SECONDS = 60  # that a test waits for another process, thread or page, before it fails
CLOCKS = {"monotonic", "perf_counter", "time"}  # of the wall; `process_time` counts work
PARTS_OF_A_PLACE = {"name", "stem", "parts"}
WAITS = {"wait", "join", "acquire", "communicate"}
OF_PAGES = {"wait_for", "wait_for_selector", "wait_for_url", "click", "fill", "press"}  # in milliseconds


def list_errors(path: Path) -> Iterator[str]:
    """Yield what in a file of tests depends on the place or on the load, each with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        said = next((say for say in (names_the_clone(node), counts_the_wall(node), hurries(node)) if say), "")
        if said:
            yield f"{path.name}:{getattr(node, 'lineno', 0)} {said}"


def names_the_clone(node: ast.AST) -> str:
    """Return a fault if a part of the name of the clone or of the working folder is asked for."""
    if not isinstance(node, ast.Attribute) or node.attr not in PARTS_OF_A_PLACE:
        return ""
    place = ast.unparse(node.value)
    return f"reads {place}.{node.attr}" if place in {"ROOT", "Path.cwd()"} else ""


def counts_the_wall(node: ast.AST) -> str:
    """Return a fault if an assertion compares a difference of wall times with less than LEAST_SECONDS."""
    if not isinstance(node, ast.Assert) or not isinstance(node.test, ast.Compare):
        return ""
    limit = node.test.comparators[-1]
    if not isinstance(node.test.ops[-1], ast.Lt | ast.LtE) or "PATIENCE" in ast.unparse(limit):
        return ""
    is_short = not isinstance(limit, ast.Constant) or limit.value < MIN_SECONDS
    taken = node.test.left
    is_difference = isinstance(taken, ast.BinOp) and isinstance(taken.op, ast.Sub)
    if not is_difference or not is_short or not set(_calls(taken)) & CLOCKS:
        return ""
    return "demands a time of the wall: measure time.process_time()"


def hurries(node: ast.AST) -> str:
    """Return a fault if something is waited for too short a time. Below a second, it is a pause in a loop."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    limits = [each.value for each in node.keywords if each.arg == "timeout"]
    if node.func.attr in WAITS and len(node.args) == 1 and not node.keywords:
        limits += node.args
    for limit in limits:
        if isinstance(limit, ast.Constant) and isinstance(limit.value, int | float):
            seconds = limit.value / (1000 if node.func.attr in OF_PAGES else 1)
            if limit.value >= 1 and seconds < MIN_SECONDS and not isinstance(limit.value, bool):
                return f"waits {seconds} s: use tests.waiting.PATIENCE"
    return ""


def _calls(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Call):
            yield each.func.attr if isinstance(each.func, ast.Attribute) else getattr(each.func, "id", "")


@pytest.mark.parametrize("room", sorted({path.relative_to(ROOT / "tests").parts[0] for path in FILES}))
def test_no_test_reads_the_name_of_the_clone_or_hurries(room: str) -> None:
    files = [path for path in FILES if path.relative_to(ROOT / "tests").parts[0] == room]
    assert [error for path in files for error in list_errors(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "text.replace(Path.cwd().name, '')",
        "words = ROOT.name",
        "assert time.monotonic() - began < 10",
        "thread.join(20)",
        "page.wait_for_selector('x', timeout=30000)",
        "link = client.HTTPConnection('127.0.0.1', port, timeout=20)",
    ],
)
def test_such_a_line_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "test_a.py").write_text(line, encoding="utf-8")
    assert len([*list_errors(tmp_path / "test_a.py")]) == 1


@pytest.mark.parametrize(
    "line",
    [
        "path = tmp_path / 'a'\nname = path.name",
        "assert time.process_time() - began < 2",
        "assert time.monotonic() < end",
        "thread.join(PATIENCE)",
        "gate.wait(0.1)",
        "page.wait_for_selector('x', timeout=120_000)",
    ],
)
def test_such_a_line_is_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "test_a.py").write_text(line, encoding="utf-8")
    assert [*list_errors(tmp_path / "test_a.py")] == []


# ---- the account


def test_the_home_folder_is_new_and_its_path_is_hard() -> None:
    home = Path.home()
    assert home == Path(os.environ["XDG_STATE_HOME"])
    assert re.search(" ", home.name)
    assert not home.name.isascii()


def test_what_a_user_has_set_does_not_reach_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    set_by_user = {
        "HF_TOKEN": "secret",
        "HF_HOME": "/cache",
        "HTTPS_PROXY": "http://proxy",
        "http_proxy": "http://proxy",
        "XDG_CONFIG_HOME": "/config",
        "GIT_DIR": "/elsewhere",
        "REELSMITH_FROM_QUEUE": "1",
        "COLUMNS": "40",
    }
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    for name in account.HOMES:
        monkeypatch.setenv(name, before[name])  # restores it

    home = account.enter_new_account()
    try:
        assert set_by_user.keys() & os.environ.keys() == set()
        assert Path.home() == home
        assert [*home.iterdir()] == []
    finally:
        account.leave_account(home)
    assert not home.exists()
