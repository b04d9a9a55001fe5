"""When and under which names a run is saved, and which older files are removed."""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from training.saving.options import SavingOptions

logger = logging.getLogger(__name__)

WriteFile = Callable[[Path], None]
Publish = Callable[[Path], None]  # pass on a finished file or folder, e.g. to the hub


@dataclass(frozen=True)
class Names:
    """Make the names of files and state folders: `x-000001.safetensors`, `x-step00000020-state`."""

    folder: Path
    name: str
    # what ends the names of the files that are saved together: the names of experts; none if there is one
    parts: tuple[str, ...] = ()

    def epoch(self, number: int) -> str:
        return f"{self.name}-{number:06d}"

    def step(self, number: int) -> str:
        return f"{self.name}-step{number:08d}"

    def file(self, stem: str) -> Path:
        """Return the file, or of several the first."""
        return next(iter(self.files(stem).values()))

    def files(self, stem: str) -> dict[str, Path]:
        """Return the files that are saved together by the endings of their names: `x-000001_high_noise`."""
        if not self.parts:
            return {"": self.folder / f"{stem}.safetensors"}
        return {part: self.folder / f"{stem}_{part}.safetensors" for part in self.parts}

    def averages(self, stem: str) -> dict[str, Path]:
        """Return the files of the weights' average, as `files`."""
        return self.files(f"{stem}-ema")

    @property
    def pattern(self) -> str:
        """Return a pattern of how the name of any file goes on behind its stem."""
        return r"(?:-ema)?" + (f"_(?:{'|'.join(self.parts)})" if self.parts else "") + r"\.safetensors"

    def state(self, stem: str) -> Path:
        return self.folder / f"{stem}-state"


@dataclass
class MinuteClock:
    """Tell when this many minutes have passed since the last save. `now` returns seconds."""

    minutes: float | None
    now: Callable[[], float] = time.monotonic
    last: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.last = self.now()

    def is_due(self) -> bool:
        return self.minutes is not None and self.now() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        self.last = self.now()


@dataclass(frozen=True)
class Saver:
    """Write files and states of a run and remove expired ones. Only in the main process."""

    options: SavingOptions
    names: Names
    write_files: Mapping[str, WriteFile]  # by what ends the file's name: see `Names.parts`
    write_state: WriteFile
    publish: Publish
    publish_state: Publish
    # of the weights' average, beside each file; none if it is not kept
    write_averages: Mapping[str, WriteFile] = field(default_factory=dict)

    def save_step(self, step: int, with_state: bool | None = None) -> None:
        """Save under the step's name; then remove files older than --save_last_n_steps."""
        self._save(self.names.step(step), self.options.save_state if with_state is None else with_state)
        self.tidy_steps(step)

    def save_epoch(self, epoch: int) -> None:
        """Save under the epoch's name (from 1); then remove files older than --save_last_n_epochs."""
        self._save(self.names.epoch(epoch), self.options.save_state)
        self.tidy_epochs(epoch)

    def save_final(self) -> None:
        """Save under the plain name."""
        self._save(self.names.name, self.options.save_state or self.options.save_state_on_train_end)

    def tidy_steps(self, step: int) -> None:
        """Remove files that a save at `step` no longer keeps."""
        options = self.options
        # saves by the clock may be at any step
        every = 1 if options.save_every_n_minutes is not None else options.save_every_n_steps or 1
        for pattern, last_n in self._kinds(
            r"-step(\d{8,})", options.save_last_n_steps, options.save_last_n_steps_state
        ):
            _remove_up_to(self.names.folder, pattern, last_expired_step(step, every, last_n), every)

    def tidy_epochs(self, epoch: int) -> None:
        """Remove files that a save at `epoch` no longer keeps."""
        options, every = self.options, self.options.save_every_n_epochs or 1
        for pattern, last_n in self._kinds(
            r"-(\d{6,})", options.save_last_n_epochs, options.save_last_n_epochs_state
        ):
            _remove_up_to(self.names.folder, pattern, last_expired_epoch(epoch, every, last_n), every)

    def _kinds(
        self, number: str, last_n: int | None, last_n_states: int | None
    ) -> tuple[tuple[str, int | None], ...]:
        """Return the pattern of files and that of states, each with how many are kept."""
        start = re.escape(self.names.name) + number
        return (start + self.names.pattern, last_n), (
            start + "-state",
            last_n if last_n_states is None else last_n_states,
        )

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed run of this name left behind."""
        start = rf"\.{re.escape(self.names.name)}(-\d{{6,}}|-step\d{{8,}})?"
        pattern = rf"{start}(-state|{self.names.pattern})\..+\.tmp"
        for entry in sorted(self.names.folder.iterdir()) if self.names.folder.is_dir() else []:
            if re.fullmatch(pattern, entry.name):
                _remove(entry)

    def _save(self, stem: str, with_state: bool) -> None:
        averages, files, state = self.names.averages(stem), self.names.files(stem), self.names.state(stem)
        written = []
        for paths, writes in ((averages, self.write_averages), (files, self.write_files)):
            for part, write in writes.items():
                write(paths[part])
                logger.info("Saved %s", paths[part])
                written.append(paths[part])
        for path in reversed(written):  # the file before its average
            self.publish(path)
        if with_state:
            self.write_state(state)
            logger.info("Saved %s", state)
            self.publish_state(state)


class NoSaver:
    """Save nothing, in processes that are not the main one."""

    def save_step(self, step: int, with_state: bool | None = None) -> None: ...

    def save_epoch(self, epoch: int) -> None: ...

    def save_final(self) -> None: ...


def last_expired_step(step: int, every: int, last_n_steps: int | None) -> int | None:
    """Return the newest multiple of `every` that a save at `step` no longer keeps.

    Every 5, last 5: at step 25 it is 15, so 20 and 25 remain.
    """
    if last_n_steps is None:
        return None
    number = step - last_n_steps - 1
    number -= number % every
    return number if number > 0 else None


def last_expired_epoch(epoch: int, every: int, last_n_epochs: int | None) -> int | None:
    """Return the newest epoch that a save at `epoch` no longer keeps."""
    if last_n_epochs is None:
        return None
    number = epoch - every * last_n_epochs
    return number if number > 0 else None


def _remove_up_to(folder: Path, pattern: str, number: int | None, every: int) -> None:
    """Remove entries whose number is a multiple of `every` and at most `number`.

    All of them, not only the newest: a run killed before it could remove one leaves it to the next save.
    """
    if number is None or not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        match = re.fullmatch(pattern, entry.name)
        if match is None or int(match[1]) > number or int(match[1]) % every:
            continue
        # moved aside first: a folder that is half removed must not look like a state
        aside = entry.with_name(f".{entry.name}.removed.tmp")
        try:
            os.replace(entry, aside)
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
