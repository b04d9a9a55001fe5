"""Keep the results of runs of one name apart: one saves at a time, those of earlier ones are set aside."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from modules.atomic_write import make_folder
from modules.console import count_of
from modules.errors import OutputError
from modules.file_locks import only_one
from training.reports.history import history_path, read_session
from training.reports.page import page_path
from training.reports.sample_files import FOLDER as SAMPLES
from training.reports.sample_files import results_pattern
from training.saving.files import Names
from training.saving.states import recover_states, state_pattern

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold_name(folder: Path, name: str) -> Iterator[None]:
    """Let no other training save under this name in this folder during the block.

    The folder is made; if it is empty in the end, it is removed again.

    Raises OutputError if another one does so already, or if nothing can be written in the folder.
    """
    is_new = not folder.exists()
    make_folder(folder, "--output_dir")
    with contextlib.ExitStack() as held:
        if is_new:
            held.callback(_remove_if_empty, folder)
        try:
            held.enter_context(only_one(folder / f".{name}.training.lock", waits=False))
        except BlockingIOError:
            raise OutputError(
                f"--output_name {name}: another training is saving under this name in {folder}. "
                "Wait until it has ended, or give another --output_name or --output_dir."
            ) from None
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def is_of_another_run(names: Names, session: int) -> bool:
    """Return whether the history under this name is of another run. session: of this one."""
    found = read_session(history_path(names.folder, names.name))
    return found is not None and found != session


def list_results(names: Names) -> list[Path]:
    """Return the files and states of a run of this name, samples included."""
    stem = re.escape(names.name) + r"(?:-\d{6,}|-step\d{8,})?"
    files, states = re.compile(stem + names.pattern), state_pattern(names.name)
    pages = {page_path(names.folder, names.name), history_path(names.folder, names.name)}
    samples = results_pattern(names.name)
    found = [
        entry
        for entry in _entries(names.folder)
        if (states.fullmatch(entry.name) if entry.is_dir() else files.fullmatch(entry.name) or entry in pages)
    ]
    return found + [entry for entry in _entries(names.folder / SAMPLES) if samples.fullmatch(entry.name)]


def set_aside(
    names: Names, inputs: Collection[Path], now: datetime, is_restarted: bool = False
) -> Path | None:
    """Move the results of an earlier run to a folder beside them; return it, or None if there are none.

    inputs: files and states that this run reads. A file is copied instead of moved, so that the same command
    works again; a state only stays. is_restarted: the run looked for a state to go on from; then results
    without saves are its own, and stay. Raises OutputError if a file cannot be moved.
    """
    recover_states(names.folder, names.name)
    kept = {os.path.realpath(path) for path in inputs}
    results = list_results(names)
    moved = [entry for entry in results if not (entry.is_dir() and os.path.realpath(entry) in kept)]
    if not moved or (is_restarted and not any(_is_saved(entry) for entry in results)):
        return None
    folder = _make_new(names.folder / f"{names.name}.before-{now:%Y%m%d-%H%M%S}")
    for entry in moved:
        target = folder / entry.relative_to(names.folder)
        try:
            target.parent.mkdir(exist_ok=True)
            if os.path.realpath(entry) in kept:
                _copy(entry, target)
            else:
                os.replace(entry, target)
        except OSError as error:
            raise OutputError(
                f"{entry} cannot be moved to {folder}: {error.strerror or error}. Close the programs that "
                "show it, or give another --output_name, or --overwrite."
            ) from error
    states = sum(entry.is_dir() for entry in folder.iterdir() if entry.name != SAMPLES)
    logger.info(
        "Earlier results named %s (%s%s) are now in %s; with --overwrite they would have been replaced.",
        names.name,
        count_of(len(moved) - states, "file"),
        f", {count_of(states, 'state')}" if states else "",
        folder,
    )
    return folder


def paths_in(values: Mapping[str, Any]) -> list[Path]:
    """Return the paths among the values of options."""
    flat = (each if isinstance(each, (list, tuple)) else (each,) for each in values.values())
    return [value for each in flat for value in each if isinstance(value, Path)]


def find_set_aside(folder: Path, name: str) -> list[Path]:
    """Return the states of earlier runs that were set aside, the newest run last."""
    states, pattern = state_pattern(name), re.compile(rf"{re.escape(name)}\.before-\d{{8}}-\d{{6}}(-\d+)?")
    asides = [entry for entry in _entries(folder) if pattern.fullmatch(entry.name)]
    return [entry for aside in asides for entry in _entries(aside) if states.fullmatch(entry.name)]


def _is_saved(entry: Path) -> bool:
    return entry.is_dir() or entry.suffix == ".safetensors"


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _make_new(folder: Path) -> Path:
    """Make a folder of this name, or with a number behind it if there is one of this second."""
    number, made = 1, folder
    while True:
        with contextlib.suppress(FileExistsError):
            made.mkdir()
            return made
        number += 1
        made = folder.with_name(f"{folder.name}-{number}")


def _copy(file: Path, target: Path) -> None:
    """Give a file a second name; copy it where the volume cannot. Whoever replaces it leaves the other."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
