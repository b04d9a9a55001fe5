"""Look at captions: missing ones, empty ones, and those longer than the text encoders read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.checking.findings import TableFindings
from dataset.sources.captions import describe_cut
from dataset.sources.faults import Fault
from dataset.sources.listing import missing_captions
from dataset.sources.media_source import MediaSource
from modules.contract.family import TextEncoder
from modules.contract.rules import CountTokens, TokenCount
from modules.errors import CheckpointError, OptionError
from modules.paths import path_exists

NO_CAPTION = "have no caption"


@dataclass(frozen=True)
class Counters:
    """How the text encoders count tokens, and why some cannot."""

    by_name: tuple[tuple[str, CountTokens], ...]
    missing: tuple[str, ...] = ()  # lines

    def count(self, caption: str) -> list[tuple[str, TokenCount]]:
        return [(name, count(caption)) for name, count in self.by_name]


def load_counters(text_encoders: Callable[[], Sequence[TextEncoder]]) -> Counters:
    """Load the tokenizers that are here. No encoder is loaded and nothing is downloaded."""
    found, missing = [], []
    try:
        encoders = text_encoders()
    except (OptionError, CheckpointError) as error:
        return Counters((), (f"tokens are not counted: {error}",))
    for encoder in encoders:
        try:
            found.append((encoder.name, encoder.token_counter()))
        except CheckpointError as error:
            missing.append(f"tokens of {encoder.name} are not counted: {error}")
    return Counters(tuple(found), tuple(missing))


def check_captions(found: TableFindings, counters: Counters) -> None:
    """Add the faults of the captions of a table's sources, except for unreadable ones."""
    missing = [source for source in found.sources if source.caption is None and not is_unread(source)]
    lines = missing_captions(missing)
    found.faults += [
        Fault(NO_CAPTION, line, source.stem) for line, source in zip(lines, missing, strict=True)
    ]
    found.remarks += [
        Fault("have an empty caption", str(one.caption_path or one.path), one.stem)
        for one in found.sources
        if one.caption == ""
    ]
    if counters.by_name:
        found.remarks += [fault for one in found.sources for fault in _cut(one, counters)]


def is_unread(source: MediaSource) -> bool:
    """Return whether the caption is there but could not be read: the listing has reported that."""
    return source.caption_path is not None and path_exists(source.caption_path)


def _cut(source: MediaSource, counters: Counters) -> list[Fault]:
    place = source.caption_path or source.path
    return [
        Fault(f"have a caption longer than {name} reads", describe_cut(place, name, count), source.stem)
        for caption in (source.caption or "", *source.more_captions)
        for name, count in counters.count(caption)
        if count.is_cut
    ]
