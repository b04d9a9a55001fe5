"""What all tests share."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

from tests import chromium, long_tests, marks, their_frequencies

their_frequencies.make_exact()

FILES_BETWEEN = 10  # of tests, after which garbage older than a test is collected too


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what compares the marks `long` with measured times."""
    parser.addoption("--measure-long-tests", action="store_true", help="print where marks `long` are wrong")


def pytest_configure(config: pytest.Config) -> None:
    """Measure if that is asked for."""
    if config.getoption("measure_long_tests"):
        config.pluginmanager.register(long_tests.Measuring())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Scripts collect garbage between their phases, which takes half a second a time once all libraries are
    loaded.

    What was there before a test and its fixtures, of any scope, is left out of that.
    """
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


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


@pytest.fixture(autouse=True, scope="session")
def _user_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands remember for the user goes elsewhere."""
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        os.environ[name] = str(tmp_path_factory.mktemp("user"))


@pytest.fixture(autouse=True, scope="module")
def _old_garbage(files_done: list[None]) -> Iterator[None]:
    yield
    files_done.append(None)
    if len(files_done) % FILES_BETWEEN == 0:
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _browser_of_the_file() -> Iterator[None]:
    yield
    chromium.end_browser()


@pytest.fixture(scope="session")
def files_done() -> list[None]:
    """One entry for each file of tests that this process has ended."""
    return []


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
