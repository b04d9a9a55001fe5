"""Collect the findings of each table: totals, faults, remarks, captions, unused files."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.report.looks import Look
from dataset.batches.order import split_validation
from dataset.config import DatasetConfig, DatasetTable
from dataset.options import GUESS
from dataset.sources.captions import SHOWN, describe_cut, guess_captions, read_caption
from dataset.sources.left_out import left_out_files, left_out_folders
from dataset.sources.listing import find_sources, missing_captions
from dataset.sources.media_source import Fault, MediaSource, list_faults
from dataset.sources.unread import find_unread
from modules.atomic_write import write_bytes, write_text
from modules.console import as_size, count_of
from modules.contract.family import TextEncoder
from modules.contract.rules import CountTokens, TokenCount
from modules.errors import CheckpointError, DatasetError, OptionError
from modules.installation import RUN_GOES_ON, SOURCES_LEFT_OUT
from modules.limits import MAX_CAPTION_BYTES
from modules.paths import path_exists
from modules.text_encodings import EncodingGuess
from modules.text_files import bad_character, read_content

BACKUP = ".bak"  # behind the name of a caption that is rewritten
LISTED = 50  # most lines of one kind
UNUSABLE = "tables cannot be used"
NO_CAPTION = "have no caption"


@dataclass
class TableFindings:
    """Findings in one table; filled as a check goes on."""

    table: DatasetTable
    title: str = ""  # "data.toml, [[datasets]] 1 (clips): 3 videos, 6 items"
    sources: Sequence[MediaSource] = ()
    # items by (width, height), (width, height, frames), or these followed by the size of each reference
    buckets: Counter[tuple[int, ...]] = field(default_factory=Counter)
    held: Counter[tuple[int, ...]] = field(default_factory=Counter)  # those for validation
    places: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # source and bucket of each item
    faults: list[Fault] = field(default_factory=list)  # must be corrected
    remarks: list[Fault] = field(default_factory=list)  # left out or cut off: worth knowing
    caches: list[str] = field(default_factory=list)  # lines about its cache files
    times: float = 1.0  # factor of its repeats: regularisation images balance the others
    looks: list[Look] = field(default_factory=list)  # of its sources, if they were measured

    def unusable(self, error: DatasetError) -> None:
        self.faults.append(Fault(UNUSABLE, str(error)))

    def told(self, name: str, with_kind: bool = False) -> dict[str | None, list[str]]:
        """Return the texts of `faults` or `remarks` by the stem of their source. with_kind: add kinds."""
        found: dict[str | None, list[str]] = {}
        for one in getattr(self, name):
            text = f"{one.kind}: {one.text}" if with_kind and not one.kind.startswith("give no") else one.text
            found.setdefault(one.stem, []).append(text)
        return found

    def add_items(self, stems: Sequence[str], bucket: tuple[int, ...]) -> None:
        self.buckets[bucket] += len(stems)
        self.places += [(stem, bucket) for stem in stems]

    @property
    def num_items(self) -> int:
        return self.buckets.total()

    def bucket_rows(self) -> list[tuple[tuple[int, ...], int, int, int]]:
        """Return (bucket, items, batches in an epoch, items in the last batch) of each bucket, ascending."""
        size = self.table.batch_size
        rows = []
        for bucket, count in sorted(self.buckets.items()):
            shown = round(count * self.table.num_repeats * self.times)
            batches = -(-shown // size)
            rows.append((bucket, count, batches, shown - (batches - 1) * size if shown else size))
        return rows

    def lines(self) -> list[str]:
        """Return all findings as lines to print."""
        size, repeats = self.table.batch_size, self.table.num_repeats * self.times
        times = str(int(repeats)) if repeats == int(repeats) else f"{repeats:.1f}"
        lines = []
        for bucket, count, batches, last in self.bucket_rows():
            frames = f", {count_of(bucket[2], 'frame')}" if len(bucket) == 3 else references_in_words(bucket)
            remainder = f" (the last has {last})" if last < size else ""
            sizes = frames[2:] if self.table.is_of_sound else f"{bucket[0]}x{bucket[1]}{frames}"
            of_size = f"{count_of(batches, 'batch')} of {size}{remainder}"
            lines.append(f"{sizes}: {count_of(count, 'item')} x {times}, {of_size}")
        found = list_faults([*self.faults, *self.remarks], LISTED)
        return [self.title, *indent([*lines, *self.caches, *found])]


def references_in_words(bucket: tuple[int, ...]) -> str:
    sizes = [f"{width}x{height}" for width, height in zip(bucket[2::2], bucket[3::2], strict=False)]
    return f" with {' and '.join(sizes)}" if sizes else ""


@dataclass(frozen=True)
class Counters:
    """Token counters of the text encoders, and lines about those that are missing."""

    by_name: tuple[tuple[str, CountTokens], ...] = ()
    missing: tuple[str, ...] = ()  # lines

    def count(self, caption: str) -> list[tuple[str, TokenCount]]:
        return [(name, count(caption)) for name, count in self.by_name]


NO_COUNTERS = Counters()


@dataclass(frozen=True)
class CheckResult:
    """Findings in each table, with lines to print before and after."""

    head: tuple[str, ...]
    tables: tuple[TableFindings, ...]
    tail: tuple[str, ...]
    counters: Counters  # for the page

    @property
    def num_faults(self) -> int:
        return sum(len(found.faults) for found in self.tables)

    @property
    def num_held(self) -> int:
        """Return how many items are kept for validation."""
        return sum(found.held.total() for found in self.tables)

    @property
    def num_remarks(self) -> int:
        return sum(len(found.remarks) for found in self.tables)

    @property
    def num_batches(self) -> int:
        return count_batches(self.tables)

    @property
    def exit_code(self) -> int:
        faults = [fault for found in self.tables for fault in found.faults]
        if os.environ.get(RUN_GOES_ON) and not any(fault.ends_run for fault in faults):
            return SOURCES_LEFT_OUT if faults else 0
        return 1 if faults else 0

    @property
    def lines(self) -> list[str]:
        faults, remarks = self.num_faults, self.num_remarks
        verdict = f"Something is wrong: see above. Faults: {faults}." if faults else "Nothing is wrong."
        tables = [line for found in self.tables for line in found.lines()]
        return [*self.head, *tables, *self.tail, verdict + (f" Remarks above: {remarks}." if remarks else "")]


@dataclass(frozen=True)
class _PlacedItem:
    """Table and source of an item, for `split_validation`."""

    table: DatasetTable
    source_stem: str
    bucket: tuple[int, ...]


def hold_back(tables: Sequence[TableFindings], share: float, seed: int) -> None:
    """Fill `held` with the split of a training. share, seed: for tables that do not give their own."""
    places = [_PlacedItem(found.table, stem, bucket) for found in tables for stem, bucket in found.places]
    by_index = {found.table.index: found for found in tables}
    for place in split_validation(places, share, seed)[1]:
        by_index[place.table.index].held[place.bucket] += 1


def balance(tables: Sequence[TableFindings]) -> None:
    """Set `times` for the regularisation images of each dataset. tables: all of a configuration."""
    learned, raw = Counter[int](), Counter[int]()
    for found in tables:
        counts = raw if found.table.is_reg else learned
        counts[found.table.batch_group] += found.num_items * found.table.num_repeats
    for found in tables:
        group = found.table.batch_group
        if found.table.is_reg and raw[group]:
            found.times = learned[group] / raw[group]


def count_batches(tables: Iterable[TableFindings]) -> int:
    """Return the batches of an epoch, without those of validation. Subsets of a dataset share them.

    With regularisation images it may differ by a few: they are assumed to be spread evenly over sizes.
    """
    counts: dict[tuple[int, ...], float] = {}
    sizes: dict[tuple[int, ...], int] = {}
    for found in tables:
        table = found.table
        for bucket, count in (found.buckets - found.held).items():
            key = (table.batch_group, *bucket)
            counts[key] = counts.get(key, 0) + count * table.num_repeats * found.times
            sizes[key] = table.batch_size
    return sum(math.ceil(round(count, 6) / sizes[key]) for key, count in counts.items())


def indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def find_table(config: DatasetConfig, table: DatasetTable) -> TableFindings:
    """List the sources of a table with all faults of the listing, and the files beside them.

    Remarks name unused files that look as if they were meant to be used.
    """
    found = TableFindings(table)
    try:
        found.sources = find_sources(table, faults=found.faults)
    except DatasetError as error:
        found.unusable(error)
        return found
    with contextlib.suppress(DatasetError):  # the listing has reported it
        found.remarks += find_unread(table)
    counts = count_references(found.sources) if table.references is not None else []
    if counts:
        words = ", ".join(f"{count_of(images, 'image')} with {number}" for number, images in counts)
        found.caches.append(f"reference pictures: {words}")
        kind = "have no reference picture, while others have"
        found.remarks += [Fault(kind, str(one.path), one.stem) for one in found.sources if not one.control]
    if any(one.references or one.control_mask for one in found.sources):
        from dataset.sources.companions import companion_lines

        found.caches += companion_lines(found.sources, found.remarks)
    if (line := left_out_files(config, table)) is not None:
        found.remarks.append(Fault("folders are not read whole", line))
    if table is config.datasets[0]:
        found.remarks += [Fault("folders are not searched", line) for line in left_out_folders(config)]
    return found


def count_references(sources: Iterable[MediaSource]) -> list[tuple[int, int]]:
    counts = Counter(len(source.control) for source in sources)
    return sorted(counts.items()) if any(counts) else []


# --- captions
# ------------------------------------------------------------------------------------------------------------


def load_counters(text_encoders: Callable[[], Sequence[TextEncoder]]) -> Counters:
    """Load the tokenizers that are on this machine; no encoder is loaded, nothing is downloaded."""
    found, missing = [], []
    try:
        encoders = text_encoders()
    except (OptionError, CheckpointError) as error:
        return Counters((), (f"tokens of captions are not counted, which is no fault: {error}",))
    for encoder in encoders:
        try:
            found.append((encoder.name, encoder.token_counter()))
        except CheckpointError as error:
            missing.append(f"tokens of {encoder.name} are not counted: {error}")
    return Counters(tuple(found), tuple(missing))


def check_captions(found: TableFindings, counters: Counters = NO_COUNTERS) -> None:
    """Add the faults of the captions of a table's sources, except for unreadable ones."""
    missing = [source for source in found.sources if source.caption is None and not is_unread(source)]
    for line, source in zip(missing_captions(missing), missing, strict=True):
        found.faults.append(Fault(NO_CAPTION, line, source.stem))
    for source in found.sources:
        place = source.caption_path or source.path
        if source.caption == "":
            found.remarks.append(Fault("have an empty caption", str(place), source.stem))
    sizes: dict[str, list[int]] = {}
    for source in found.sources if counters.by_name else ():
        place = source.caption_path or source.path
        for caption in (source.caption or "", *source.more_captions):
            for name, count in counters.count(caption):
                sizes.setdefault(name, []).append(count.size_bytes)
                if count.is_cut:
                    kind, text = f"have a caption longer than {name} reads", describe_cut(place, name, count)
                    found.remarks.append(Fault(kind, text, source.stem))
    for name, own in sizes.items():
        if most := max(own):
            more = ", more with what it sees of references" if found.table.texts_see_references else ""
            words = f"{as_size(sum(own))}, that of the longest caption {as_size(most)}{more}"
            found.caches.append(f"text caches of {name}: about {words}")


def is_unread(source: MediaSource) -> bool:
    """Return whether a caption file exists but could not be read; the listing has reported it."""
    return source.caption_path is not None and path_exists(source.caption_path)


# --- captions that are not UTF-8
# ------------------------------------------------------------------------------------------------------------


def repair_captions(config: DatasetConfig, encoding: str) -> list[str]:
    """Rewrite the captions of all tables that are not UTF-8; the old file stays beside each as .bak.

    encoding: Python's name, or GUESS: a file of uncertain encoding is left as it is. Returns lines about what
    was done. Raises OutputError if a file cannot be written.
    """
    converted, left = [], []
    for table in config.datasets:
        try:
            sources = find_sources(table, captions=False, faults=[])
        except DatasetError:
            continue  # the check reports it
        paths = []
        for path in sorted({one.caption_path for one in sources if one.caption_path is not None}):
            try:
                read_caption(path)
            except DatasetError:
                paths += [path] if path.is_file() else []
        guesses = guess_captions(paths) if encoding == GUESS else [_decode(path, encoding) for path in paths]
        for path, guess in zip(paths, guesses, strict=True):
            backup = path.with_name(path.name + BACKUP)
            if guess is None or bad_character(guess.text):
                left.append(f"  {path}: left as it is, it is no text in that encoding")
                continue
            words = " ".join(guess.text.split())[:SHOWN]
            if not guess.is_sure:
                left.append(
                    f"  {path}: left as it is, it may be {guess.name}: {words!r}. If that is right, name it: "
                    f"--repair_captions {guess.encoding}"
                )
            elif backup.exists():
                left.append(f"  {path}: left as it is, {backup.name} is there already; move it away")
            else:
                # the backup first, so that the old text is never lost
                write_bytes(backup, read_content(path, MAX_CAPTION_BYTES))
                write_text(path, guess.text.removeprefix("\ufeff"))
                converted.append(f"  {path}: was {guess.name}, now UTF-8: {words!r}")
    counts = f"{count_of(len(converted), 'caption')} converted to UTF-8 (the old files end in {BACKUP})"
    return [f"{counts}, {len(left)} left as they are", *converted, *left]


def _decode(path: Path, encoding: str) -> EncodingGuess | None:
    try:
        return EncodingGuess(encoding, read_content(path, MAX_CAPTION_BYTES).decode(encoding), is_sure=True)
    except (OSError, ValueError):
        return None
