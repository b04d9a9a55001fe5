"""What all tests share."""

import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator

import pytest

import modules.interpreter  # noqa: F401  # here, as it would answer for the scripts that tests run
from tests import account, chromium, long_tests, marks, their_frequencies
from tests.commands import ROOT

their_frequencies.make_exact()

objects_kept = pytest.StashKey[int]()  # that were left out of collections since the last one of all objects
FEW_OBJECTS = 2_000  # that a collection inside a test may see of earlier tests: a millisecond
MAX_KEPT = 150_000  # objects, about 80 MB of small models


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes what tests take."""
    parser.addoption("--measure-tests", action="store_true", help="write tests/durations.toml")


def pytest_configure(config: pytest.Config) -> None:
    """Measure; enter an account that is new."""
    home = account.enter_new_account()
    config.add_cleanup(lambda: account.leave_account(home))
    config.pluginmanager.register(long_tests.Measuring(writes_table=config.getoption("measure_tests")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """In every second worker, import the test files from the last on, before all are collected.

    In a fresh clone pytest compiles 500 of them, most of a minute. Workers that go from both ends each find
    what the other one has compiled, from the middle on.
    """
    worker = getattr(session.config, "workerinput", {}).get("workerid", "gw0")
    if int(worker.removeprefix("gw")) % 2 == 0:
        return
    folders = [session.config.invocation_params.dir / argument for argument in session.config.args]
    for path in sorted((path for folder in folders for path in folder.rglob("test_*.py")), reverse=True):
        # what fails or skips here does so again when it is collected, and is reported then
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Leave what was there before a test and its fixtures, of any scope, out of its garbage collections.

    Scripts collect garbage between their phases, which takes a second a time once all libraries and tests
    are loaded. So what earlier tests have left is collected before it is frozen. Models of their fixtures
    that are garbage later are collected between two files, once there may be many. Nothing here asks how
    much is frozen: Python counts that one by one.
    """
    stash = item.config.stash
    if len(gc.get_objects()) > FEW_OBJECTS:
        gc.collect()
        # at first the libraries, which stay
        stash[objects_kept] = stash[objects_kept] + len(gc.get_objects()) if objects_kept in stash else 0
        gc.freeze()
    try:
        return (yield)
    finally:
        is_last = nextitem is None or nextitem.path != item.path
        if is_last and not chromium.is_used_by(getattr(nextitem, "module", None)):
            chromium.end_browser()
        room = _room_of(item)
        if nextitem is None or _room_of(nextitem) != room:
            _forget_networks(room)
        if is_last and stash.get(objects_kept, 0) > MAX_KEPT:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            stash[objects_kept] = 0


def _room_of(item: pytest.Item) -> str:
    """Return the folder below tests of a test, or its file."""
    return item.path.relative_to(ROOT / "tests").parts[0]


def _forget_networks(room: str) -> None:
    """Empty the caches of tiny networks that a room has used: hundreds of megabytes in some rooms."""
    packages = ("tests.tiny.", "tests.parity.", f"tests.{room}.")
    for name, module in list(sys.modules.items()):
        if name.startswith(packages):
            for function in vars(module).values():
                if getattr(function, "__module__", "") == name and hasattr(function, "cache_clear"):
                    function.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the marks that follow from what a test calls, before a choice is made by them."""
    marks.set_marks(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU if there is none.

    Of a mark `gpu(unless=NAME)` NAME is an environment variable that names another device to run on.
    """
    mark = item.get_closest_marker("gpu")
    if mark is not None and not os.environ.get(mark.kwargs.get("unless", "")):
        import torch  # slow: many tests need no torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip tests for which torch has no kernel under ATEN_CPU_CAPABILITY: one for 16 bits asks the processor
    instead, and fails.
    """
    try:
        return (yield)
    except RuntimeError as error:
        if "pack_vnni2" in str(error):
            pytest.skip(f"torch: {error}")
        raise


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled code, and what torch counts of it, is of one test only."""
    import torch  # slow: many tests need no torch
    from torch._dynamo.utils import counters

    # pytest would write all of it down
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
