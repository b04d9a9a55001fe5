"""Write captions, each at once and whole, and never over one that a person has written meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.captions.backups import keep_backup
from data_tools.captions.lists import CaptionList
from data_tools.captions.made import MadeCaptions
from data_tools.captions.places import CaptionPlace
from data_tools.captions.planning import FOREIGN, CaptionJob
from dataset.sources.captions import read_caption
from modules.atomic_write import write_text
from modules.errors import DatasetError


@dataclass
class CaptionWriter:
    """Writes captions into files and lists. Call `close` at the end, also after an error."""

    made: Mapping[Path, MadeCaptions]
    lists: Mapping[Path, CaptionList]
    num_put: int = 0
    changed: list[CaptionPlace] = field(default_factory=list)  # kept, as a person has written them meanwhile

    def write(self, job: CaptionJob, text: str) -> None:
        """Write a caption. Raises OutputError if it cannot be written."""
        place = job.place
        made = self.made[place.file.parent]
        if place.entry is not None:
            made.add(place.name, text)
            self.lists[place.file].put(place.entry, text, place.caption, job.why == FOREIGN)
            self.num_put += 1
            return
        if _has_changed(place):
            self.changed.append(place)
            return
        if job.why == FOREIGN:
            keep_backup(place.file)
        made.add(place.name, text)
        write_text(place.file, text)
        self.num_put += 1

    def close(self) -> None:
        """Put waiting captions into the lists."""
        for one in self.lists.values():
            one.merge()

    @property
    def num_changed(self) -> int:
        """Return how many captions were left alone because a person has written them meanwhile."""
        return len(self.changed) + self._num_late

    @property
    def num_written(self) -> int:
        """Return how many captions were written."""
        return self.num_put - self._num_late

    @property
    def _num_late(self) -> int:
        return sum(len(one.kept) for one in self.lists.values())


def _has_changed(place: CaptionPlace) -> bool:
    """Return whether the file holds something else than when the captions were listed."""
    try:
        return read_caption(place.file) != place.caption
    except DatasetError:
        return True
