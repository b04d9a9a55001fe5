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
from modules.console import format_count
from modules.errors import OutputError
from modules.file_locks import only_one
from modules.text_files import read_safetensors_texts, real_path
from protocols.rules import ModelRelease
from training.reports.history import AVERAGE, WORKFLOW, history_path
from training.reports.sections import SAMPLES, captions_folder, is_section_file, page_path
from training.saving.options import SavingOptions

logger = logging.getLogger(__name__)

# gets the expert (see `Names.expert_names`) or the word of an embedding, and the path of its file
WriteFile = Callable[[str, Path], None]


SAFETENSORS = ".safetensors"
MAX_EMBEDDING_BYTES = 2 << 20  # largest size of an embedding's file
INDEX = "model_index.json"  # in the folder of a pipeline in diffusers' layout


@dataclass(frozen=True)
class Names:
    """Make the names of files and state folders: `x-000001.safetensors`, `x-step00000020-state`."""

    folder: Path
    name: str
    # experts whose files one save has, `x-000001_high_noise`; empty if the model is one file
    expert_names: tuple[str, ...] = ()
    suffix: str = SAFETENSORS  # of the model files; "" if each model is a folder
    embedding_words: tuple[str, ...] = ()  # words of trained embeddings, which end the names of their files

    def model_files(self, stem: str) -> dict[str, Path]:
        """Return the model files of one save by expert: `high_noise` -> `x-000001_high_noise`.

        A model that is one file has the key "".
        """
        if not self.expert_names:
            return {"": self.folder / f"{stem}{self.suffix}"}
        return {expert: self.folder / f"{stem}_{expert}{self.suffix}" for expert in self.expert_names}

    def embedding_files(self, stem: str) -> dict[str, Path]:
        """Return the embedding file of each trained word in one save: `mycat` -> `x-000001_mycat`."""
        return {word: self.folder / f"{stem}_{word}{SAFETENSORS}" for word in self.embedding_words}

    def full_stem(self, file: Path) -> str:
        """Return the name of a file without its suffix."""
        return file.name.removesuffix(self.suffix)

    def get_stem(self, file: Path) -> str:
        """Return the stem that all files of a save share, without the suffix for an expert or new word."""
        stem = file.name.removesuffix(self.suffix)
        for ending in (*self.expert_names, *self.embedding_words):
            shared_stem = stem.removesuffix(f"_{ending}")
            # the name of the run may itself end like this, and is not shortened
            if shared_stem != stem and shared_stem.startswith(self.name):
                return shared_stem
        return stem

    @property
    def pattern(self) -> str:
        """Regular expression for the end of a saved file's name, after the run's name and the step."""
        average = f"(?:{re.escape(AVERAGE)})?"
        experts = f"_(?:{'|'.join(self.expert_names)})" if self.expert_names else ""
        words = f"(?:_(?:{'|'.join(map(re.escape, self.embedding_words))}))?" if self.embedding_words else ""
        return f"{average}(?:{experts}{words}{re.escape(self.suffix)}|{re.escape(WORKFLOW)})"


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
        """Start uploading a saved file."""

    def publish_state(self, folder: Path) -> None:
        """Start uploading a state folder."""

    def close(self) -> None:
        """Wait until all uploads have ended."""


@dataclass
class MinuteClock:
    """Measure the minutes since the last save. `now` returns seconds."""

    minutes: float
    now: Callable[[], float] = time.monotonic
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.last = self.now()

    def is_due(self) -> bool:
        """Return whether enough minutes have passed since the last save."""
        return self.now() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        """Restart the interval until the next save by time."""
        self.last = self.now()


def write_models(saver: "Saver", stem: str) -> list[Path]:
    """Write the files of the model and of its average under a name; return their paths, averages last."""
    write_by_ending = {"": saver.write_file}
    if saver.write_average is not None:
        write_by_ending = {AVERAGE: saver.write_average, **write_by_ending}
    written: list[Path] = []
    for average_ending, write in write_by_ending.items():
        files = saver.names.model_files(f"{stem}{average_ending}")
        if saver.names.embedding_words:
            files |= saver.names.embedding_files(f"{stem}{average_ending}")
        for expert_or_word, path in files.items():
            write(expert_or_word, path)
            logger.info("Saved %s", path)
            written.append(path)
    return written[::-1]


@dataclass(frozen=True)
class Saver:
    """Write files and states of a run, and remove expired ones, in the main process.

    If the model is sharded, the other processes only send their part of each tensor.
    """

    options: SavingOptions
    names: Names
    write_file: WriteFile
    write_state: Callable[[Path], None]
    publisher: Publisher | None  # None: nothing is uploaded
    write_average: WriteFile | None = None  # writes the averaged weights; None if there is no average
    is_main: bool = True
    # the phase SAVE of a run: `write_models` with what features put around it
    write_models: Callable[["Saver", str], list[Path]] = write_models
    log_saved: Callable[[Sequence[Path]], None] = lambda _: None  # gets all files of a save
    on_removed: Callable[[], None] = lambda: None  # is called after files have expired

    def save_step(self, step: int, with_state: bool | None = None) -> None:
        """Save after an optimizer step; `with_state` overrides --save_state."""
        self._save(f"-step{step:08d}", self.options.save_state if with_state is None else with_state)
        self.remove_expired(step=step)

    def save_epoch(self, epoch: int) -> None:
        """Save after an epoch, with a state if --save_state asks for it."""
        self._save(f"-{epoch:06d}", self.options.save_state)
        self.remove_expired(epoch=epoch)

    def save_final(self) -> None:
        """Save the final model under the run's name without a step or epoch number."""
        self._save("", self.options.saves_state_at_end)

    def remove_expired(self, step: int | None = None, epoch: int | None = None) -> None:
        """Remove saves that --save_last_n_steps or --save_last_n_epochs no longer keep at this step or epoch.

        With --save_every_n_steps 5 and --save_last_n_steps 5, step 25 removes the saves up to step 15.
        """
        options = self.options
        last_steps = (options.save_last_n_steps, options.save_last_n_steps_state)
        if step is not None and last_steps != (None, None):
            self._remove_expired_steps(step, *last_steps)
        last_epochs = (options.save_last_n_epochs, options.save_last_n_epochs_state)
        if epoch is not None and last_epochs != (None, None):
            self._remove_expired_epochs(epoch, *last_epochs)

    def _remove_expired_steps(self, step: int, num_models: int | None, num_states: int | None) -> None:
        """Remove models and states older than these numbers of steps; None for models removes none."""
        # The save from exactly that many steps ago is kept too.
        interval = self.options.save_every_n_steps or 1
        if self.options.save_every_n_minutes is not None:
            interval = 1  # saves by time may be at any step
        newest_models = None if num_models is None else step - 1 - num_models
        newest_states = None if num_states is None else step - 1 - num_states
        self._remove_saves(r"-step(\d{8,})", interval, newest_models, newest_states)

    def _remove_expired_epochs(self, epoch: int, num_models: int | None, num_states: int | None) -> None:
        """Remove models and states except these numbers of newest saves; None for models removes none."""
        interval = self.options.save_every_n_epochs or 1  # --save_last_n_epochs counts saves of this interval
        newest_models = None if num_models is None else epoch - interval * num_models
        newest_states = None if num_states is None else epoch - interval * num_states
        self._remove_saves(r"-(\d{6,})", interval, newest_models, newest_states)

    def _remove_saves(
        self, number_pattern: str, interval: int, newest_models: int | None, newest_states: int | None
    ) -> None:
        """Remove saved models and states up to a step or epoch."""
        # Removes all of them, not only the newest: a killed run may not have removed some.
        if not self.is_main:
            return
        if newest_states is None:
            newest_states = newest_models
        name_pattern = re.escape(self.names.name) + number_pattern
        expired: list[Path] = []
        if newest_models is not None:
            expired += self._find_saves(name_pattern + self.names.pattern, interval, newest_models)
        if newest_states is not None:
            expired += self._find_saves(f"{name_pattern}-state", interval, newest_states)
        for entry in expired:
            # Rename a file or state before removing it, so that a partly removed folder never looks like a
            # state
            aside = entry.with_name(f".{entry.name}.removed.tmp")
            try:
                replace_file(entry, aside)
                _remove(aside)
            except OSError as error:  # open in another program; that must not end a run
                logger.warning("%s is kept for now because it cannot be removed: %s", entry, error)
            else:
                logger.info("Removed %s", entry)
        if expired:
            self.on_removed()

    def _find_saves(self, pattern: str, interval: int, newest: int) -> list[Path]:
        """Return the models or states of the run up to step or epoch `newest`."""
        if newest < interval:  # keeps a save at 0 until the first interval has expired
            return []
        saves = []
        for entry in _entries(self.names.folder):
            match = re.fullmatch(pattern, entry.name)
            if match is not None and int(match[1]) % interval == 0 and int(match[1]) <= newest:
                saves.append(entry)
        return saves

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed run of this name left behind."""
        start = rf"\.{re.escape(self.names.name)}(-\d{{6,}}|-step\d{{8,}})?"
        pattern = rf"{start}(-state|{self.names.pattern})\..+\.tmp"
        for entry in _entries(self.names.folder) if self.is_main else ():
            if re.fullmatch(pattern, entry.name):
                _remove(entry)

    def _save(self, ending: str, with_state: bool) -> None:
        """Write models, averages and a state under the run's name; publish and log them."""
        stem = f"{self.names.name}{ending}"
        written = self.write_models(self, stem)
        if self.is_main:
            if self.publisher is not None:
                for path in written:
                    self.publisher.publish(path)
            self.log_saved(written)
        if with_state:
            folder = self.names.folder / f"{stem}-state"
            self.write_state(folder)
            logger.info("Saved %s", folder)
            if self.is_main and self.publisher is not None:
                self.publisher.publish_state(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def reserve_name(folder: Path, name: str) -> Iterator[None]:
    """Reserve a name in a folder during the block, so that no other training run saves files under it.

    The folder is created if it does not exist; in that case it is removed at the end if it is empty.

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
                    "Wait until it has ended, or pass another --output_name or --output_dir."
                ) from None
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def move_earlier_results(
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
    results = find_results(names)
    has_saves = any(entry.is_dir() or entry.suffix == SAFETENSORS for entry in results)
    if not results or (is_restarted and not has_saves):
        return None
    input_paths = [real_path(path) for path in inputs]
    in_use = {entry for entry in results if _is_input(entry, input_paths)}
    entries_to_move = [entry for entry in results if not (entry in in_use and _is_state(entry))]
    if not entries_to_move:
        return None
    folder = _make_new(names.folder / f"{names.name}.before-{now:%Y%m%d-%H%M%S}")
    for entry in entries_to_move:
        _move_or_copy(entry, folder / entry.relative_to(names.folder), folder, keeps_original=entry in in_use)
    # Log how many files and states of an earlier run were moved to a folder
    num_moved = len(entries_to_move)
    num_states = sum(_is_state(entry) for entry in folder.iterdir())
    logger.info(
        "Earlier results named %s (%s%s) are now in %s; with --overwrite they would have been replaced.",
        names.name,
        format_count(num_moved - num_states, "file"),
        f", {format_count(num_states, 'state')}" if num_states else "",
        folder,
    )
    return folder


def move_aside(names: Names, entries: Sequence[Path], now: datetime) -> Path | None:
    """Move results of this run to a folder next to them; return it, or None if there are none.

    Raises:
        OutputError: If one cannot be moved.
    """
    if not entries:
        return None
    folder = _make_new(names.folder / f"{names.name}.before-{now:%Y%m%d-%H%M%S}")
    for entry in entries:
        _move_or_copy(entry, folder / entry.name, folder, keeps_original=False)
    return folder


def _move_or_copy(entry: Path, target: Path, folder: Path, keeps_original: bool) -> None:
    """Move an earlier result to a path in `folder`, or copy it if the new run still reads it."""
    try:
        target.parent.mkdir(exist_ok=True)
        if not keeps_original:
            replace_file(entry, target)
        elif entry.is_dir():
            shutil.copytree(entry, target, copy_function=_copy)
        else:
            _copy(entry, target)
    except OSError as error:
        raise OutputError(
            f"{entry} cannot be moved to {folder}: {error.strerror or error}. Close any program that "
            "has it open, pass another --output_name, or use --overwrite."
        ) from error


def find_results(names: Names) -> list[Path]:
    """Return the files, states, samples and pages that a run has written under its name.

    Embeddings of learned words that were saved next to LoRAs are found even if `names` has other words or
    none.
    """
    results = []
    for entry in _entries(names.folder):
        # on a case-insensitive disk, `Cat` and `cat` are the same run
        has_name = entry.name.casefold().startswith(names.name.casefold())
        if has_name and _is_result(entry, _spell_as(entry, names.name), names):
            results.append(entry)
    # after the name: epoch or step, then `sheet.png`, or the index of the prompt and the time
    samples = re.compile(re.escape(names.name) + r"_(e?\d{6,})_(sheet\.png|\d{2,9}_\d{14}[\w.-]*)")
    in_samples = _entries(names.folder / SAMPLES)
    results += [entry for entry in in_samples if samples.fullmatch(_spell_as(entry, names.name))]
    return results


def _is_result(entry: Path, name: str, names: Names) -> bool:
    """Return whether a run wrote a file or folder: a model, a state, an embedding or a page."""
    # cat, cat-000002 (after an epoch) or cat-step00000100
    stem = re.escape(names.name) + r"(?:-\d{6,}|-step\d{8,})?"
    if entry.is_dir():
        is_model = re.fullmatch(f"{stem}(?:{AVERAGE})?", name) is not None and is_saved_folder(entry)
        is_captions = entry.with_name(name) == captions_folder(names.folder, names.name)
        return is_model or is_captions or state_pattern(names.name).fullmatch(name) is not None
    if re.fullmatch(stem + replace(names, suffix=SAFETENSORS).pattern, name):
        return True
    pages = {page_path(names.folder, names.name), history_path(names.folder, names.name)}
    if entry.with_name(name) in pages or is_section_file(name, names.name):
        return True
    embedding = re.fullmatch(f"{stem}(?:{AVERAGE})?_(.+){re.escape(SAFETENSORS)}", name)
    name_on_disk = entry.name[: len(names.name)]
    return embedding is not None and _is_word_embedding(entry, name_on_disk, word=embedding[1])


def _spell_as(entry: Path, start: str) -> str:
    """Return an entry's name; on a case-insensitive file system, spell its beginning as `start`."""
    # On Windows and macOS, `cat` and `Cat` are the same file, so a run called `Cat` would replace the results
    # of `cat`.
    spelled = start + entry.name[len(start) :]
    if spelled == entry.name or spelled.casefold() != entry.name.casefold():
        return entry.name
    other = entry.with_name(spelled)
    return spelled if other.exists() and other.samefile(entry) else entry.name


def is_saved_folder(folder: Path) -> bool:
    """Return whether a folder is a model saved by a training run."""
    return (folder / INDEX).is_file() or is_model_folder(folder)


def _is_word_embedding(file: Path, name: str, word: str) -> bool:
    """Return whether a file contains only the embedding of a word, by its metadata."""
    try:
        if file.stat().st_size > MAX_EMBEDDING_BYTES:  # too large for an embedding: a LoRA
            return False
        metadata = read_safetensors_texts(file)
    except (OSError, ValueError):
        return False
    is_network = "ss_network_module" in metadata
    is_from_run = metadata.get("ss_output_name") == name and metadata.get("ss_train_embedding") == word
    return is_from_run and not is_network


def _is_state(entry: Path) -> bool:
    return entry.is_dir() and entry.name.endswith("-state")


def _is_input(entry: Path, inputs: Collection[Path]) -> bool:
    """Return whether `entry` is, or contains, one of the input paths, whose symlinks are resolved."""
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


def find_moved_states(folder: Path, name: str) -> list[Path]:
    """Return state folders of earlier runs with this name, which a later run has renamed to keep them."""
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
