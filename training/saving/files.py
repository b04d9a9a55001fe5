"""Save the files and states of a run, remove expired ones, and move results of earlier runs aside."""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from checkpoints.shard_options import is_model_folder
from modules.atomic_write import make_folder, recover_folder, replace_file
from modules.console import count_of
from modules.errors import OutputError
from modules.file_locks import only_one
from modules.text_files import read_safetensors_texts, real_path
from protocols.rules import ModelRelease
from training.reports.history import AVERAGE, WORKFLOW, history_path
from training.reports.sections import SAMPLES, page_path
from training.saving.options import SavingOptions

logger = logging.getLogger(__name__)

WriteFile = Callable[[str, Path], None]  # part of the model, see `Names.parts`; path of its file


SAFETENSORS = ".safetensors"
MAX_OF_WORD = 2 << 20  # largest size in bytes of an embedding's file
INDEX = "model_index.json"  # in the folder of a pipeline in diffusers' layout


@dataclass(frozen=True)
class Names:
    """Make the names of files and state folders: `x-000001.safetensors`, `x-step00000020-state`."""

    folder: Path
    name: str
    # names of experts, which end the names of the files of one save; empty if there is only one file
    parts: tuple[str, ...] = ()
    ending: str = SAFETENSORS  # suffix of the files; "" if each model is a folder
    beside: tuple[str, ...] = ()  # words of trained embeddings, which end the names of their files

    def files(self, stem: str) -> dict[str, Path]:
        """Return the files of the model's parts in one save, by part: `high_noise` -> `x-000001_high_noise`.

        A model that is one file has the key "".
        """
        if not self.parts:
            return {"": self.folder / f"{stem}{self.ending}"}
        return {part: self.folder / f"{stem}_{part}{self.ending}" for part in self.parts}

    def files_beside(self, stem: str) -> dict[str, Path]:
        """Return the embedding file of each trained word in one save: `mycat` -> `x-000001_mycat`."""
        return {word: self.folder / f"{stem}_{word}{SAFETENSORS}" for word in self.beside}

    def full_stem(self, file: Path) -> str:
        """Return the name of a file without its suffix."""
        return file.name.removesuffix(self.ending)

    def stem_of(self, file: Path) -> str:
        """Return the stem that the names of all files of a save share, without the part's suffix."""
        stem = self.full_stem(file)
        stems = (stem.removesuffix(f"_{end}") for end in (*self.parts, *self.beside))
        # the name of the run may itself end with such a part, which is then kept
        return next((short for short in stems if short != stem and short.startswith(self.name)), stem)

    @property
    def pattern(self) -> str:
        """Regular expression for the end of a saved file's name, after the name of the run and the step."""
        average = f"(?:{re.escape(AVERAGE)})?"
        parts = f"_(?:{'|'.join(self.parts)})" if self.parts else ""
        words = f"(?:_(?:{'|'.join(map(re.escape, self.beside))}))?" if self.beside else ""
        return f"{average}(?:{parts}{words}{re.escape(self.ending)}|{re.escape(WORKFLOW)})"


@dataclass(frozen=True)
class PublishedRun:
    """Description of a run for the model card of its uploaded files."""

    names: Names
    is_lora: bool
    release: ModelRelease  # of the model
    metadata: Mapping[str, str]  # metadata of the saved file
    prompts: Sequence[str]  # prompts of the samples


class Publisher(Protocol):
    """Interface of an uploader of saved files and states, for example to a hub."""

    def for_run(self, run: PublishedRun) -> "Publisher":
        """Return a publisher that can describe the run, for example in a model card."""

    def publish(self, path: Path) -> None:
        """Start publishing a saved file."""

    def publish_state(self, folder: Path) -> None:
        """Start publishing a state folder."""

    def close(self) -> None:
        """Wait until everything has been published."""


@dataclass
class MinuteClock:
    """Measure the minutes since the last save. `now` returns seconds."""

    minutes: float
    now: Callable[[], float] = time.monotonic
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.last = self.now()

    def is_due(self) -> bool:
        """Return whether the minutes have passed since the last save."""
        return self.now() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        """Restart the interval until the next save by time."""
        self.last = self.now()


@dataclass(frozen=True)
class Saver:
    """Write files and states of a run, and remove expired ones, in the main process.

    If the model is split over processes, the other processes only send their part of each tensor.
    """

    options: SavingOptions
    names: Names
    write_file: WriteFile
    write_state: Callable[[Path], None]
    publisher: Publisher | None  # None: nothing is uploaded
    write_average: WriteFile | None = None  # writes the averaged weights; None if there is no average
    is_main: bool = True
    log_saved: Callable[[Sequence[Path]], None] = lambda _: None  # gets all files of a save
    on_removed: Callable[[], None] = lambda: None  # is called after files have expired

    def save_step(self, step: int, with_state: bool | None = None) -> None:
        """Save after an optimizer step; `with_state` overrides --save_state."""
        self._save(f"-step{step:08d}", self.options.save_state if with_state is None else with_state)
        self.tidy(step=step)

    def save_epoch(self, epoch: int) -> None:
        """Save after an epoch, with a state if --save_state asks for it."""
        self._save(f"-{epoch:06d}", self.options.save_state)
        self.tidy(epoch=epoch)

    def save_final(self) -> None:
        """Save the final model under the run's name without a step or epoch number."""
        self._save("", self.options.saves_state_at_end)

    def tidy(self, step: int | None = None, epoch: int | None = None) -> None:
        """Remove saves that --save_last_n_steps or --save_last_n_epochs no longer keep at this step or epoch.

        With --save_every_n_steps 5 and --save_last_n_steps 5, step 25 removes the saves up to step 15.
        """
        options = self.options
        # how far back saves are kept: a pair for models and for states
        last = options.save_last_n_steps, options.save_last_n_steps_state
        if step is not None and last != (None, None):
            # saves by the clock may be at any step
            every = 1 if options.save_every_n_minutes is not None else options.save_every_n_steps or 1
            self._remove_expired(r"-step(\d{8,})", every, last, now=step - 1, unit=1)
        last = options.save_last_n_epochs, options.save_last_n_epochs_state
        if epoch is not None and last != (None, None):
            every = options.save_every_n_epochs or 1
            self._remove_expired(r"-(\d{6,})", every, last, now=epoch, unit=every)

    def _remove_expired(
        self, number: str, every: int, last: tuple[int | None, int | None], *, now: int, unit: int
    ) -> None:
        """Remove files and states whose number is a multiple of `every` and expired.

        Removes all of them, not only the newest: a killed run may not have removed some.

        Args:
            number: Regular expression of the number in names.
            every: Number of steps or epochs between two saves.
            last: Values of --save_last_n for files and for states: those up to now - unit * n expire.
            now: Current step or epoch.
            unit: Unit of --save_last_n, in steps or epochs.
        """
        if not self.is_main:
            return
        last_files, last_states = last
        if last_states is None:  # without an option of their own, states expire with the models
            last_states = last_files
        name_pattern = re.escape(self.names.name) + number
        expired: list[Path] = []
        if last_files is not None:
            file_pattern = name_pattern + self.names.pattern
            expired += self._find_expired(file_pattern, every, newest=now - unit * last_files)
        if last_states is not None:
            state_pattern = f"{name_pattern}-state"
            expired += self._find_expired(state_pattern, every, newest=now - unit * last_states)
        for entry in expired:
            _remove_aside(entry)
        if expired:
            self.on_removed()

    def _find_expired(self, pattern: str, every: int, newest: int) -> list[Path]:
        """Return the files or states of the run up to step or epoch `newest`.

        Args:
            pattern: Regular expression of their names, in which the first group is the step or epoch.
            every: Number of steps or epochs between two saves; saves at other numbers are kept.
            newest: Last step or epoch that expires.
        """
        expired = []
        for entry in _entries(self.names.folder):
            match = re.fullmatch(pattern, entry.name)
            if match is None or int(match[1]) % every:  # another name, or not a save of this interval
                continue
            if int(match[1]) <= newest and newest >= every:
                expired.append(entry)
        return expired

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed run of this name left behind."""
        start = rf"\.{re.escape(self.names.name)}(-\d{{6,}}|-step\d{{8,}})?"
        pattern = rf"{start}(-state|{self.names.pattern})\..+\.tmp"
        for entry in _entries(self.names.folder) if self.is_main else ():
            if re.fullmatch(pattern, entry.name):
                _remove(entry)

    def _save(self, end: str, with_state: bool) -> None:
        """Write model, average and state under the run's name with the suffix `end`; publish and log them."""
        written = list[Path]()
        stem = f"{self.names.name}{end}"
        state = self.names.folder / f"{stem}-state"
        kinds = {"": self.write_file}
        if self.write_average is not None:
            kinds = {AVERAGE: self.write_average, **kinds}
        for suffix, write in kinds.items():
            files = self.names.files(f"{stem}{suffix}")
            if self.names.beside:
                files |= self.names.files_beside(f"{stem}{suffix}")
            for part, path in files.items():
                write(part, path)
                logger.info("Saved %s", path)
                written.append(path)
        written.reverse()  # the file before its average
        if self.is_main:
            if self.publisher is not None:
                for path in written:
                    self.publisher.publish(path)
            self.log_saved(written)
        if with_state:
            self.write_state(state)
            logger.info("Saved %s", state)
            if self.is_main and self.publisher is not None:
                self.publisher.publish_state(state)


def _remove_aside(entry: Path) -> None:
    """Rename a file or state, then remove it, so that no partly removed folder looks like a state."""
    aside = entry.with_name(f".{entry.name}.removed.tmp")
    try:
        replace_file(entry, aside)
        _remove(aside)
    except OSError as error:  # open in another program; that must not end a run
        logger.warning("%s is kept for now because it cannot be removed: %s", entry, error)
    else:
        logger.info("Removed %s", entry)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def hold_name(folder: Path, name: str) -> Iterator[None]:
    """Reserve a name in a folder during the block, so that no other training run saves files under it.

    The folder is created; if it is empty at the end, it is removed again.

    Raises:
        OutputError: If another training run has reserved the name, or if the folder is not writable.
    """
    is_new = not folder.exists()
    make_folder(folder, "--output_dir")
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_one(folder / f".{name}.training.lock", waits=False))
            except BlockingIOError:
                raise OutputError(
                    f"--output_name {name}: another training is saving under this name in {folder}. "
                    "Wait until it has ended, or give another --output_name or --output_dir."
                ) from None
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def set_aside(
    names: Names, inputs: Collection[Path], now: datetime, is_restarted: bool = False
) -> Path | None:
    """Move the results of an earlier run to a folder next to them; return it, or None if there are none.

    Args:
        names: Names of the run's files.
        inputs: Files and states that this run reads. A file is copied instead of moved, so that the same
            command works again; a state is left where it is.
        now: Time for the name of the folder.
        is_restarted: Whether the run looked for a state to resume from; results without saved files are then
            its own and are not moved.

    Raises:
        OutputError: If a file cannot be moved.
    """
    recover_states(names.folder, names.name)  # finish what a killed run was writing
    input_paths = [real_path(path) for path in inputs]
    results = find_results(names)
    in_use = {entry for entry in results if _is_input(entry, input_paths)}
    set_aside_entries = [entry for entry in results if not (entry in in_use and _is_state(entry))]
    has_saves = any(entry.is_dir() or entry.suffix == SAFETENSORS for entry in results)
    if not set_aside_entries or (is_restarted and not has_saves):
        return None
    folder = _make_new(names.folder / f"{names.name}.before-{now:%Y%m%d-%H%M%S}")
    for entry in set_aside_entries:
        target = folder / entry.relative_to(names.folder)
        try:
            target.parent.mkdir(exist_ok=True)
            if entry in in_use and entry.is_dir():
                shutil.copytree(entry, target, copy_function=_copy)
            elif entry in in_use:
                _copy(entry, target)
            else:
                replace_file(entry, target)
        except OSError as error:
            raise OutputError(
                f"{entry} cannot be moved to {folder}: {error.strerror or error}. Close the programs that "
                "show it, or give another --output_name, or --overwrite."
            ) from error
    num_states = sum(_is_state(entry) for entry in folder.iterdir())
    logger.info(
        "Earlier results named %s (%s%s) are now in %s; with --overwrite they would have been replaced.",
        names.name,
        count_of(len(set_aside_entries) - num_states, "file"),
        f", {count_of(num_states, 'state')}" if num_states else "",
        folder,
    )
    return folder


def find_results(names: Names) -> list[Path]:
    """Return the files, states, samples and pages that a run has written under its name.

    Embeddings of learned words that were saved next to LoRAs are found even if `names` has other words or
    none.
    """
    from training.reports.sections import is_section_file  # only before the first step

    start = re.escape(names.name)
    states = state_pattern(names.name)
    number = r"(?:-\d{6,}|-step\d{8,})?"
    files = re.compile(start + number + replace(names, ending=SAFETENSORS).pattern)
    folders = re.compile(start + number + f"(?:{AVERAGE})?")  # models that are folders
    word_files = re.compile(start + number + f"(?:{AVERAGE})?_(.+){re.escape(SAFETENSORS)}")
    # after the name: epoch or step, then `sheet.png`, or the index of the prompt and the time
    samples = re.compile(start + r"_(e?\d{6,})_(sheet\.png|\d{2,9}_\d{14}[\w.-]*)")
    pages = {page_path(names.folder, names.name), history_path(names.folder, names.name)}
    results = []
    for entry in _entries(names.folder):
        name = entry.name
        # on a case-insensitive disk, `Cat` and `cat` are the same run
        if name.casefold().startswith(names.name.casefold()):
            name = _spell_as(entry, names.name)
        if entry.is_dir():
            is_model = folders.fullmatch(name) is not None and is_saved_folder(entry)
            is_result = is_model or states.fullmatch(name) is not None
        else:
            is_result = files.fullmatch(name) is not None or entry.with_name(name) in pages
            is_result = is_result or is_section_file(name, names.name)
            word = word_files.fullmatch(name)
            name_on_disk = entry.name[: len(names.name)]
            is_result = is_result or (word is not None and _is_embedding_of(entry, name_on_disk, word[1]))
        if is_result:
            results.append(entry)
    in_samples = _entries(names.folder / SAMPLES)
    results += [entry for entry in in_samples if samples.fullmatch(_spell_as(entry, names.name))]
    return results


def _spell_as(entry: Path, start: str) -> str:
    """Return an entry's name with its beginning spelled as `start`, if the file system is case-insensitive.

    On Windows and macOS, `cat` and `Cat` are the same file, so a run called `Cat` would replace the
    results of `cat`.
    """
    spelled = start + entry.name[len(start) :]
    if spelled == entry.name or spelled.casefold() != entry.name.casefold():
        return entry.name
    other = entry.with_name(spelled)
    return spelled if other.exists() and other.samefile(entry) else entry.name


def is_saved_folder(folder: Path) -> bool:
    """Return whether a folder is a model saved by a training run."""
    return (folder / INDEX).is_file() or is_model_folder(folder)


def _is_embedding_of(file: Path, name: str, word: str) -> bool:
    """Return whether a file contains only the embedding of a word, by its metadata.

    Args:
        file: The file.
        name: Name of the run that saved it.
        word: The word.
    """
    try:
        if file.stat().st_size > MAX_OF_WORD:  # too large for an embedding: a LoRA
            return False
        metadata = read_safetensors_texts(file)
    except (OSError, ValueError):
        return False
    is_network = "ss_network_module" in metadata
    texts = metadata.get("ss_output_name"), metadata.get("ss_train_embedding")
    return not is_network and texts == (name, word)


def _is_state(entry: Path) -> bool:
    return entry.is_dir() and entry.name.endswith("-state")


def _is_input(entry: Path, inputs: Collection[Path]) -> bool:
    """Return whether one of the input paths is this entry or lies inside it; inputs are real paths."""
    real = real_path(entry)
    return any(path.is_relative_to(real) for path in inputs)


def state_pattern(name: str) -> re.Pattern[str]:
    """Return the regular expression that matches names of the state folders of a run."""
    return re.compile(rf"{re.escape(name)}(-\d{{6,}}|-step\d{{8,}})?-state")


def recover_states(output_dir: Path, name: str) -> None:
    """Restore or delete `.NAME.old` folders, left if a run was killed while it replaced NAME."""
    pattern = re.compile(rf"{re.escape(name)}(-\d{{6,}}|-step\d{{8,}})?(-state|{AVERAGE})?")
    for entry in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        if entry.name.endswith(".old") and pattern.fullmatch(entry.name[1:].removesuffix(".old")):
            recover_folder(entry.with_name(entry.name[1:].removesuffix(".old")))


def find_set_aside(folder: Path, name: str) -> list[Path]:
    """Return state folders of earlier runs with this name that a later run renamed to set them aside."""
    states = state_pattern(name)
    pattern = re.compile(rf"{re.escape(name)}\.before-\d{{8}}-\d{{6}}(-\d+)?")
    asides = [entry for entry in _entries(folder) if pattern.fullmatch(entry.name)]
    return [entry for aside in asides for entry in _entries(aside) if states.fullmatch(entry.name)]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _make_new(folder: Path) -> Path:
    """Create a folder with this name, numbered if the name is taken within the same second."""
    number, candidate = 1, folder
    while True:
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")


def _copy(file: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it if hard links fail; a link is safe as files are never changed in place."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
