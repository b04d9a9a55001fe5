"""Collect the findings of each table: totals, faults, remarks, captions, unused files."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.report.looks import Look
from dataset.batches.order import split_validation
from dataset.config import DatasetConfig, DatasetTable
from dataset.forms.unread import find_unused
from dataset.listing import find_encodings, find_sources, missing_captions
from dataset.options import GUESS
from dataset.sources.captions import SHOWN, guess_captions, read_caption_file
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import Fault, MediaSource, list_errors
from dataset.sources.remarks import find_caption_warnings, find_cut_captions
from modules.atomic_write import write_bytes, write_text
from modules.console import format_count, format_size
from modules.errors import CheckpointError, DatasetError, OptionError
from modules.installation import RUN_GOES_ON, SOURCES_LEFT_OUT
from modules.integers import ceil_div
from modules.limits import MAX_CAPTION_BYTES
from modules.paths import path_exists
from modules.text_encodings import EncodingGuess
from modules.text_files import bad_character, read_content
from protocols.family import TextEncoder
from protocols.rules import CountTokens, TokenCount

BACKUP = ".bak"  # suffix of the backup of a rewritten caption
LISTED = 50  # most lines of one kind
UNUSABLE = "tables cannot be used"
NO_CAPTION = "have no caption"
OFFLINE = "tokenizers are missing, and nothing is downloaded while HF_HUB_OFFLINE is set"


class BucketRow(NamedTuple):
    """Number of items and batches in one bucket of a table."""

    bucket: tuple[int, ...]
    items: int
    batches: int  # batches in an epoch
    last_batch: int  # items in the last batch


@dataclass
class TableFindings:
    """Results of the checks of one dataset table, filled in step by step."""

    table: DatasetTable
    title: str = ""  # "data.toml, [[datasets]] 1 (clips): 3 videos, 6 items"
    sources: Sequence[MediaSource] = ()
    # numbers of items by (width, height), (width, height, frames), or (width, height) and sizes of references
    buckets: Counter[tuple[int, ...]] = field(default_factory=Counter)
    held_back: Counter[tuple[int, ...]] = field(default_factory=Counter)  # items for validation
    places: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # source and bucket of each item
    faults: list[Fault] = field(default_factory=list)  # errors
    remarks: list[Fault] = field(default_factory=list)  # warnings
    caches: list[str] = field(default_factory=list)  # lines about its cache files
    times: float = 1.0  # factor on num_repeats of regularization images, see `balance`
    looks: list[Look] = field(default_factory=list)  # one per source, if sources were measured

    def unusable(self, error: DatasetError) -> None:
        """Add the error that prevents all use of the table."""
        self.faults.append(Fault(UNUSABLE, str(error)))

    def texts_by_stem(self, name: str, with_kind: bool = False) -> dict[str | None, list[str]]:
        """Group the texts of `faults` or `remarks` by the stem of their media file.

        `with_kind` prefixes each text with its kind.
        """
        texts: dict[str | None, list[str]] = {}
        errors: list[Fault] = getattr(self, name)
        for error in errors:
            text = error.text
            if with_kind and not error.kind.startswith("give no"):
                text = f"{error.kind}: {text}"
            texts.setdefault(error.stem, []).append(text)
        return texts

    def add_items(self, stems: Sequence[str], bucket: tuple[int, ...]) -> None:
        """Count the items that sources have in one bucket."""
        self.buckets[bucket] += len(stems)
        self.places += [(stem, bucket) for stem in stems]

    @property
    def num_items(self) -> int:
        """Total number of items in all buckets."""
        return self.buckets.total()

    def bucket_rows(self) -> list[BucketRow]:
        """Return the number of items and batches in each bucket, ascending by size."""
        batch_size = self.table.batch_size
        rows = []
        for bucket, num_items in sorted(self.buckets.items()):
            num_shown = round(num_items * self.table.num_repeats * self.times)
            num_batches = ceil_div(num_shown, batch_size)
            last_batch = num_shown - (num_batches - 1) * batch_size if num_shown else batch_size
            rows.append(BucketRow(bucket, num_items, num_batches, last_batch))
        return rows

    def lines(self) -> list[str]:
        """Return all findings as printable lines."""
        size = self.table.batch_size
        repeats = self.table.num_repeats * self.times
        times = str(int(repeats)) if repeats == int(repeats) else f"{repeats:.1f}"
        lines = []
        for row in self.bucket_rows():
            remainder = f" (the last has {row.last_batch})" if row.last_batch < size else ""
            batches = f"{format_count(row.batches, 'batch')} of {size}{remainder}"
            items = f"{format_count(row.items, 'item')} x {times}"
            lines.append(f"{self._bucket_in_words(row.bucket)}: {items}, {batches}")
        errors = list_errors([*self.faults, *self.remarks], LISTED)
        return [self.title, *indent([*lines, *self.caches, *errors])]

    def _bucket_in_words(self, bucket: tuple[int, ...]) -> str:
        """Describe a bucket: image size, and the number of frames or the references."""
        frames = f", {format_count(bucket[2], 'frame')}" if len(bucket) == 3 else references_in_words(bucket)
        if self.table.is_of_audio:
            return frames.removeprefix(", ")
        return f"{bucket[0]}x{bucket[1]}{frames}"


def references_in_words(bucket: tuple[int, ...]) -> str:
    """Describe the sizes of references in a bucket, for display after its size; "" without references."""
    sizes = [f"{width}x{height}" for width, height in zip(bucket[2::2], bucket[3::2], strict=False)]
    return f" with {' and '.join(sizes)}" if sizes else ""


@dataclass(frozen=True)
class Counters:
    """Token counters of the text encoders, and lines about encoders that are not available."""

    by_name: tuple[tuple[str, CountTokens], ...] = ()
    missing: tuple[str, ...] = ()  # report lines
    # encoder name -> error, for encoders whose tokenizer is missing and cannot be downloaded (offline)
    unreachable: Mapping[str, str] = field(default_factory=dict)

    def find_unreachable(self, names: Iterable[str]) -> list[Fault]:
        """Return a fault for each named encoder that a run cannot use."""
        return [Fault(OFFLINE, self.unreachable[name]) for name in names if name in self.unreachable]

    def count(self, caption: str) -> list[tuple[str, TokenCount]]:
        """Return (encoder name, token count) pairs of a caption."""
        return [(name, count(caption)) for name, count in self.by_name]


NO_COUNTERS = Counters()


@dataclass(frozen=True)
class CheckResult:
    """Findings of all tables, with the lines to print before and after them."""

    head: tuple[str, ...]
    tables: tuple[TableFindings, ...]
    tail: tuple[str, ...]
    counters: Counters  # for the page

    @property
    def num_faults(self) -> int:
        """Total number of faults in all tables."""
        return sum(len(findings.faults) for findings in self.tables)

    @property
    def num_held(self) -> int:
        """Number of items held out for validation."""
        return sum(findings.held_back.total() for findings in self.tables)

    @property
    def num_remarks(self) -> int:
        """Total number of warnings in all tables."""
        return sum(len(findings.remarks) for findings in self.tables)

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return count_batches(self.tables)

    @property
    def exit_code(self) -> int:
        """0 without faults; SOURCES_LEFT_OUT if the run can continue without the faulty sources; else 1."""
        errors = [error for findings in self.tables for error in findings.faults]
        if os.environ.get(RUN_GOES_ON) and not any(error.is_fatal for error in errors):
            return SOURCES_LEFT_OUT if errors else 0
        return 1 if errors else 0

    @property
    def lines(self) -> list[str]:
        """All lines to print; the last one says whether the check passed."""
        verdict = "Nothing is wrong."
        if self.num_faults:
            verdict = f"Something is wrong: see above. Faults: {self.num_faults}."
        if self.num_remarks:
            verdict += f" Remarks above: {self.num_remarks}."
        lines_of_tables = [line for findings in self.tables for line in findings.lines()]
        return [*self.head, *lines_of_tables, *self.tail, verdict]


@dataclass(frozen=True)
class _PlacedItem:
    """An item with its table and source, in the form that `split_validation` takes."""

    table: DatasetTable
    source_stem: str
    bucket: tuple[int, ...]


def hold_back(tables: Sequence[TableFindings], share: float, seed: int) -> None:
    """Fill `held_back` of each table with the sources that training would hold out for validation.

    `share` and `seed` apply to tables that do not state their own.
    """
    places = [
        _PlacedItem(findings.table, stem, bucket) for findings in tables for stem, bucket in findings.places
    ]
    by_index = {findings.table.index: findings for findings in tables}
    _, validated = split_validation(places, share, seed)
    for place in validated:
        by_index[place.table.index].held_back[place.bucket] += 1


def balance(tables: Sequence[TableFindings]) -> None:
    """Set how often regularization images repeat, so that an epoch has as many of them as of other images.

    Args:
        tables: Findings for all tables of a configuration.
    """
    # items in an epoch, by batch group
    learned = Counter[int]()
    regularization = Counter[int]()
    for findings in tables:
        counts = regularization if findings.table.is_reg else learned
        counts[findings.table.batch_group] += findings.num_items * findings.table.num_repeats
    for findings in tables:
        group = findings.table.batch_group
        # batches only mix tables of one batch group
        if findings.table.is_reg and regularization[group]:
            findings.times = learned[group] / regularization[group]


def count_batches(tables: Iterable[TableFindings]) -> int:
    """Return the number of training batches in an epoch; subsets of a dataset share batches.

    With regularization images the number is approximate, because they are assumed to be spread evenly over
    sizes.
    """
    counts: dict[tuple[int, ...], float] = {}
    sizes: dict[tuple[int, ...], int] = {}
    for findings in tables:
        table = findings.table
        trained = findings.buckets - findings.held_back
        for bucket, count in trained.items():
            key = (table.batch_group, *bucket)
            counts[key] = counts.get(key, 0) + count * table.num_repeats * findings.times
            sizes[key] = table.batch_size
    # rounded first: `times`, the factor on regularization images, is a quotient and may end in ...0001
    return sum(math.ceil(round(count, 6) / sizes[key]) for key, count in counts.items())


def indent(lines: Iterable[str]) -> list[str]:
    """Indent lines by two spaces."""
    return [f"  {line}" for line in lines]


def find_table(config: DatasetConfig, table: DatasetTable, folders: TableFolders) -> TableFindings:
    """Start the findings of a table: list its sources, the errors of listing them, and unused files.

    Only those unused files are reported that seem to be meant for use. `folders` holds the folders of all
    tables.
    """
    findings = TableFindings(table)
    try:
        findings.sources = find_sources(table, faults=findings.faults)
    except DatasetError as error:
        findings.unusable(error)
        return findings
    findings.remarks += find_encodings(findings.sources)
    with contextlib.suppress(DatasetError):  # already reported by `find_sources`
        findings.remarks += find_unused(table)
    if table.references is not None:
        _add_references(findings)
    if any(source.references or source.control_mask for source in findings.sources):
        from dataset.sources.companions import companion_lines  # only with companions

        findings.caches += companion_lines(findings.sources, findings.remarks)
    # preference pairs: a source with a rejected counterpart
    num_pairs = sum(source.rejected is not None for source in findings.sources)
    if num_pairs:
        findings.caches.append(f"pairs of a better and a worse one: {num_pairs}")
    left_out = folders.left_out_files(table)
    if left_out is not None:
        findings.remarks.append(Fault("folders have files that are not used", left_out))
    # folders that no table uses are reported once, with the first table
    if table is config.datasets[0]:
        lines = folders.left_out_folders(config.datasets)
        findings.remarks += [Fault("folders are not searched", line) for line in lines]
    return findings


def _add_references(findings: TableFindings) -> None:
    """Count reference images; add a warning for each image without any if other images have some."""
    counts = count_references(findings.sources)
    if not counts:
        return
    words = ", ".join(f"{format_count(images, 'image')} with {number}" for number, images in counts)
    findings.caches.append(f"reference pictures: {words}")
    kind = "have no reference picture, while others have"
    for source in findings.sources:
        if not source.control:
            findings.remarks.append(Fault(kind, str(source.path), source.stem))


def count_references(sources: Iterable[MediaSource]) -> list[tuple[int, int]]:
    """Return sorted (number of references, number of sources) pairs; [] without references."""
    counts = Counter(len(source.control) for source in sources)
    return sorted(counts.items()) if any(counts) else []


# --- captions
# ------------------------------------------------------------------------------------------------------------


def load_counters(text_encoders: Callable[[], Sequence[TextEncoder]]) -> Counters:
    """Load the tokenizers that exist on this machine, for counting the tokens of captions."""
    from huggingface_hub import constants  # 0.1 s to import

    try:
        encoders = text_encoders()
    except (OptionError, CheckpointError) as error:
        return Counters((), (f"tokens of captions are not counted, which is no fault: {error}",))
    counters = []
    missing = []  # lines about tokenizers that are not on this machine
    unreachable = {}  # encoder -> error, if offline mode forbids to download its tokenizer
    for encoder in encoders:
        try:
            counters.append((encoder.name, encoder.token_counter()))
        except CheckpointError as error:
            missing.append(f"tokens of {encoder.name} are not counted: {error}")
            if constants.HF_HUB_OFFLINE:
                unreachable[encoder.name] = str(error)
    return Counters(tuple(counters), tuple(missing), unreachable)


def check_captions(
    findings: TableFindings, counters: Counters = NO_COUNTERS, are_cached: bool = True
) -> None:
    """Add findings about a table's captions: missing, empty or unusual ones, and those cut by an encoder.

    Unreadable captions are reported elsewhere. `are_cached` says that text embeddings are cached, so that
    their size is reported.
    """
    missing = [source for source in findings.sources if source.caption is None and not is_unused(source)]
    for line, source in zip(missing_captions(missing), missing, strict=True):
        findings.faults.append(Fault(NO_CAPTION, line, source.stem))
    for source in findings.sources:
        if source.caption == "":
            path = source.caption_path or source.path
            findings.remarks.append(Fault("have an empty caption", str(path), source.stem))
    findings.remarks += find_caption_warnings(findings.sources)
    if not counters.by_name:
        return
    warnings, sizes_bytes = find_cut_captions(findings.sources, dict(counters.by_name))
    findings.remarks += warnings
    references = ", more with what it sees of references" if findings.table.texts_see_references else ""
    for name, sizes in sizes_bytes.items():
        longest = max(sizes)
        if longest and are_cached:
            total = format_size(sum(sizes))
            sizes_text = f"{total}, that of the longest caption {format_size(longest)}{references}"
            findings.caches.append(f"text caches of {name}: about {sizes_text}")


def is_unused(source: MediaSource) -> bool:
    """Return whether a caption file exists but is unreadable, which the listing reports."""
    return source.caption_path is not None and path_exists(source.caption_path)


# --- captions that are not UTF-8
# ------------------------------------------------------------------------------------------------------------


def repair_captions(config: DatasetConfig, encoding: str) -> list[str]:
    """Convert caption files that are not UTF-8; the old files are kept as .bak.

    `encoding` is a Python codec name, or GUESS, which does not change files of uncertain encoding. Returns
    report lines.

    Raises:
        OutputError: If a file cannot be written.
    """
    converted: list[str] = []
    left_unchanged: list[str] = []
    for table in config.datasets:
        try:
            sources = find_sources(table, captions=False, faults=[])
        except DatasetError:
            continue  # the check reports it
        caption_paths = {source.caption_path for source in sources if source.caption_path is not None}
        paths = [path for path in sorted(caption_paths) if _is_other_encoding(path)]
        guesses = guess_captions(paths) if encoding == GUESS else [_decode(path, encoding) for path in paths]
        for path, guess in zip(paths, guesses, strict=True):
            _repair_caption(path, guess, converted, left_unchanged)
    counts = f"{format_count(len(converted), 'caption')} converted to UTF-8 (the old files end in {BACKUP})"
    return [f"{counts}, {len(left_unchanged)} left unchanged", *converted, *left_unchanged]


def _is_other_encoding(path: Path) -> bool:
    """Return whether a caption file may have an encoding other than UTF-8."""
    try:
        file = read_caption_file(path)
    except DatasetError:
        return path.is_file()
    return file is not None and file.encoding is not None


def _repair_caption(path: Path, guess: EncodingGuess | None, converted: list[str], left: list[str]) -> None:
    """Convert a caption file to UTF-8 if its encoding is certain; add a line to `converted` or `left`."""
    if guess is None or bad_character(guess.text):
        left.append(f"  {path}: unchanged: it is not text in that encoding")
        return
    start = " ".join(guess.text.split())[:SHOWN]
    backup = path.with_name(path.name + BACKUP)
    if not guess.is_sure:
        left.append(
            f"  {path}: unchanged: it may be {guess.name}: {start!r}. If that is right, name it: "
            f"--repair_captions {guess.encoding}"
        )
        return
    if backup.exists():
        left.append(f"  {path}: unchanged: {backup.name} exists already; move it away")
        return
    # the backup first, so that the old text is never lost
    write_bytes(backup, read_content(path, MAX_CAPTION_BYTES))
    write_text(path, guess.text.removeprefix("\ufeff"))
    converted.append(f"  {path}: was {guess.name}, now UTF-8: {start!r}")


def _decode(path: Path, encoding: str) -> EncodingGuess | None:
    """Decode a caption file with an encoding; None if its bytes are invalid in this encoding."""
    try:
        return EncodingGuess(encoding, read_content(path, MAX_CAPTION_BYTES).decode(encoding), is_sure=True)
    except (OSError, ValueError):
        return None
