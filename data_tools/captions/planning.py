"""Decide which captions are made: those that are missing, and others if the options say so."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.captions.made import MadeCaptions
from data_tools.captions.options import CaptioningOptions
from data_tools.captions.places import CaptionPlace

MISSING, EMPTY, OURS, FOREIGN = "missing", "empty", "made by this program", "hand-written"


@dataclass(frozen=True)
class CaptionJob:
    """A caption to make."""

    place: CaptionPlace
    why: str  # MISSING, EMPTY, OURS or FOREIGN; of the last the old file is kept

    @property
    def path(self) -> Path:
        """Return the image or clip."""
        return self.place.source.path


@dataclass(frozen=True)
class CaptionPlan:
    """Captions that a run makes, and those that it leaves."""

    jobs: tuple[CaptionJob, ...]
    num_kept: int
    num_done_before: int  # of an earlier run that makes captions anew and was interrupted

    def count(self, why: str) -> int:
        """Return how many captions are made for this reason."""
        return sum(job.why == why for job in self.jobs)


def needs_texts(options: CaptioningOptions) -> bool:
    """Return whether the plan depends on the text of existing captions."""
    return options.overwrite or options.overwrite_all or options.fill_empty


def read_made(places: Iterable[CaptionPlace]) -> dict[Path, MadeCaptions]:
    """Return this program's captions by folder."""
    return {folder: MadeCaptions(folder) for folder in {place.file.parent for place in places}}


def plan_captions(
    places: Collection[CaptionPlace], made: Mapping[Path, MadeCaptions], options: CaptioningOptions
) -> CaptionPlan:
    """Return which captions are made. Nothing is written."""
    jobs = []
    done: dict[Path, frozenset[str]] = {}
    if options.overwrite or options.overwrite_all:
        what = pass_of(options)
        done = {folder: theirs.done_before(what) for folder, theirs in made.items()}
    num_done = 0
    for place in places:
        why = _why(place, made[place.file.parent], options)
        if why in (OURS, FOREIGN) and place.name in done[place.file.parent]:
            num_done += 1
        elif why is not None:
            jobs.append(CaptionJob(place, why))
    return CaptionPlan(tuple(jobs), len(places) - len(jobs) - num_done, num_done)


def pass_of(options: CaptioningOptions) -> str:
    """Return a text that is equal for runs that make the same captions anew."""
    facts = [options.overwrite_all, options.model.model, options.api.api_base, options.api.api_model]
    return hashlib.sha256(
        json.dumps([*facts, asdict(options.ask), asdict(options.wording)]).encode("utf-8")
    ).hexdigest()


def _why(place: CaptionPlace, made: MadeCaptions, options: CaptioningOptions) -> str | None:
    if not place.has_caption:
        return MISSING
    if place.caption is None:  # not read, or a line with a list of captions, which a person wrote
        return None
    if not place.caption.strip():
        return EMPTY if options.fill_empty or options.overwrite_all else None
    if made.has(place.name, place.caption):
        return OURS if options.overwrite or options.overwrite_all else None
    return FOREIGN if options.overwrite_all else None
