"""The way of a beginner, whole: a folder, `new`, `run`, the browser, its queue, and the printed command.

Everything is typed in a folder that is neither the project nor that of the data, whose name has blanks and
umlauts.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.jobs.jobs import JobQueue
from browser.runs.runs import FINISHED
from tests.browser.serving import Served, serve_runs
from tests.browser.test_dataset_page import Page
from tests.browser.test_jobs import Fields, ask, queue, wait_for_states
from tests.commands import QUIET, ROOT, run_program
from tests.package.test_wheel import Installed, installed, wheel
from tests.project.test_kinds_of_folders import POCKET, SLOW_WAYS, describe_short, write_pocket

__all__ = ["installed", "queue", "wheel"]  # fixtures
pytestmark = pytest.mark.slow
MEDIA = {".mp4", ".png", ".wav"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny models ü")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of its own, with nothing in it."""
    folder = tmp_path / "my own place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


def results_of(folder: Path) -> set[Path]:
    made = folder / "output" / "generated"
    return {path for path in made.rglob("*") if path.suffix in MEDIA} if made.is_dir() else set()


def run_as_typed(folder: str, elsewhere: Path) -> str:
    """Run a described folder and return what the training said, its commands as they are printed.

    `run_script` takes the folder of the checkout out of them.
    """
    program = [sys.executable, str(ROOT / "reelsmith.py"), "run", folder]
    done = subprocess.run(
        program, cwd=elsewhere, env={**os.environ, **QUIET}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def printed_command(said: str, title: str) -> str:
    """Return the command below a title, as it is printed."""
    lines = said.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.strip().startswith(title)]
    return lines[place + 1].strip()


def check_dataset_page(served: Served) -> None:
    """Look at the page of the one dataset: files, captions, and caches that hold."""
    files = Page(served, "dataset.toml").measured()["files"]
    # of a folder of kohya, the words of its name are the caption of files without one
    assert any(file["caption"]["text"].strip() for file in files)
    for file in files:
        states = {state for one in file["caches"].values() for state, _ in one.values()}
        assert states == {"valid"}, file


def generate_from_page(served: Served, queue: JobQueue) -> None:
    """Press the button below the command that generates on the run's page, and work until it is done."""
    page = Fields(served.ask(served.of("own")).text)
    (form,) = [form for form in page.forms if re.search("_generate_", form.get("line", ""))]
    assert ask(served, "add", **form) == 303
    queue.start_next()
    wait_for_states(queue, FINISHED)


@pytest.mark.parametrize(("name", "kind"), SLOW_WAYS)
def test_a_folder_becomes_a_lora_and_a_clip(
    name: str,
    kind: str,
    models: Path,
    tmp_path: Path,
    elsewhere: Path,
    queue: JobQueue,  # noqa: F811
) -> None:
    folder, _ = describe_short(name, kind, models, tmp_path)

    said = run_as_typed(os.path.relpath(folder), elsewhere)

    assert "WARNING: output/own.html is not complete" not in said
    for root in (folder / "output", folder, folder.parent):
        with serve_runs(root, queue=queue) as served:
            assert served.ask(served.of("own")).status == 200
            check_dataset_page(served)
    with serve_runs(folder / "output", queue=queue) as served:
        generate_from_page(served, queue)
    first = results_of(folder)
    assert first

    words = shlex.split(printed_command(said, "Generate with it"))
    run_program(Path(sys.executable), *words[1:], folder=folder)

    assert len(results_of(folder)) == 2 * len(first)


def test_the_installed_package_goes_the_same_way(
    installed: Installed,  # noqa: F811
    models: Path,
    tmp_path: Path,
    elsewhere: Path,
) -> None:
    folder, _ = describe_short(POCKET, "clips", models, tmp_path)
    (folder / "run.toml").unlink()
    (folder / "dataset.toml").unlink()
    words = [*write_pocket(), "--max_train_steps", "2", "--output_name", "own"]
    said = installed.run("reelsmith", "new", folder, *words, "--overwrite").stdout
    assert not re.search(r"python \S*reelsmith", said)
    done = installed.run("reelsmith", "run", folder)
    command = shlex.split(printed_command(done.stderr, "Generate with it"))
    assert command[0] in {"reelsmith", "wan_generate_video"}
    program = installed.python.with_name(command[0])
    run_program(program, *command[1:], folder=folder, environment={"PYTHONPATH": ""})
    assert results_of(folder)
