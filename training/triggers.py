"""Files that ask a run for samples or a save at the end of its next step (--sample_now)."""

import logging
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

SAMPLE, SAVE = "sample", "save"
EVERY_SECONDS = 1.0  # looking takes microseconds on a disk, and milliseconds in a network folder
LARGEST = 64  # bytes; what a shell writes into a new file is less, and a larger one holds somebody's data


def trigger_paths(folder: Path, name: str) -> dict[Path, str]:
    """Return the files of a run with the request of each.

    `my_lora.sample` asks the run of that name, `sample` any run of the folder; a folder of that name is none.
    """
    return {folder / file: kind for kind in (SAMPLE, SAVE) for file in (f"{name}.{kind}", kind)}


@dataclass
class TriggerFiles:
    """Watch for files that ask for something, and remove them when it was done.

    A file is removed afterwards only: if the run is killed in between, the next one serves the request.
    """

    paths: Mapping[Path, str] = field(default_factory=dict)  # none: nothing is watched
    can_sample: bool = True
    now: Callable[[], float] = time.monotonic  # seconds
    _looked: float | None = field(default=None, init=False)
    _found: dict[Path, int] = field(default_factory=dict, init=False)  # with their time of change
    _passed: dict[Path, int] = field(default_factory=dict, init=False)  # likewise, those that are left alone

    def asks_for(self, kind: str) -> bool:
        """Return whether a file asks for SAMPLE or SAVE. Looks at the folder once a second at most."""
        if self.paths and (self._looked is None or self.now() - self._looked >= EVERY_SECONDS):
            self._looked = self.now()
            self._look()
        return any(self.paths[path] == kind for path in self._found)

    def finish(self, kind: str) -> None:
        """Remove the files that asked for this; one that was touched again meanwhile asks anew."""
        for path in [path for path in self._found if self.paths[path] == kind]:
            self._remove(path, self._found.pop(path))

    def _look(self) -> None:
        for path, kind in self.paths.items():
            changed = self._time_of(path)
            if changed is None or path in self._found or self._passed.get(path) == changed:
                continue
            if kind == SAMPLE and not self.can_sample:
                logger.warning("%s is ignored: there is nothing to sample without --sample_prompts.", path)
                self._remove(path, changed)
            else:
                self._found[path] = changed
                logger.info("%s asks to %s at the end of this step.", path, kind)

    def _remove(self, path: Path, changed: int) -> None:
        if self._time_of(path) != changed:
            return
        try:
            path.unlink()
        except OSError as error:
            logger.warning("%s cannot be removed, and is ignored until it changes: %s", path, error)
            self._passed[path] = changed

    def _time_of(self, path: Path) -> int | None:
        """Return when a file was changed; None if there is none, or something else of its name."""
        try:
            status = path.lstat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size > LARGEST:
            if self._passed.get(path) != status.st_mtime_ns:
                self._passed[path] = status.st_mtime_ns
                logger.warning("%s asks for nothing: it holds %d bytes.", path, status.st_size)
            return None
        return status.st_mtime_ns
