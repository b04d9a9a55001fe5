"""Collect the findings on each dataset table: totals, errors, warnings, captions, unused files."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.report.looks import Inspection
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
    num_items_by_bucket: Counter[tuple[int, ...]] = field(default_factory=Counter)
    validation_counts: Counter[tuple[int, ...]] = field(default_factory=Counter)  # items for validation
    item_buckets: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # (source's stem, bucket)
    errors: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    info_lines: list[str] = field(default_factory=list)  # about caches, masks and references
    balancing_factor: float = 1.0  # on num_repeats of regularization images, see `balance_regularization`
    inspections: list[Inspection] = field(default_factory=list)  # one per source, if sources were measured

    def add_table_error(self, error: DatasetError) -> None:
        """Add an error that makes the whole table unusable."""
        self.errors.append(Fault(UNUSABLE, str(error)))

    def add_items(self, stems: Sequence[str], bucket: tuple[int, ...]) -> None:
        """Add items of one bucket; `stems` contains the stem of each item's media file."""
        self.num_items_by_bucket[bucket] += len(stems)
        self.item_buckets += [(stem, bucket) for stem in stems]

    @property
    def num_items(self) -> int:
        """Total number of items in all buckets."""
        return self.num_items_by_bucket.total()

    def bucket_rows(self) -> list[BucketRow]:
        """Return the number of items and batches in each bucket, ascending by size."""
        batch_size = self.table.learning.batch_size
        rows = []
        for bucket, num_items in sorted(self.num_items_by_bucket.items()):
            num_repeated = round(num_items * self.table.learning.num_repeats * self.balancing_factor)
            num_batches = ceil_div(num_repeated, batch_size)
            last_batch = num_repeated - (num_batches - 1) * batch_size if num_repeated else batch_size
            rows.append(BucketRow(bucket, num_items, num_batches, last_batch))
        return rows

    def lines(self) -> list[str]:
        """Return all findings as printable lines."""
        batch_size = self.table.learning.batch_size
        repeats = self.table.learning.num_repeats * self.balancing_factor
        repeats_text = str(int(repeats)) if repeats == int(repeats) else f"{repeats:.1f}"
        lines = []
        for row in self.bucket_rows():
            remainder = f" (the last has {row.last_batch})" if row.last_batch < batch_size else ""
            batches = f"{format_count(row.batches, 'batch')} of {batch_size}{remainder}"
            items = f"{format_count(row.items, 'item')} x {repeats_text}"
            lines.append(f"{self._describe_bucket(row.bucket)}: {items}, {batches}")
        errors = list_errors([*self.errors, *self.warnings], LISTED)
        return [self.title, *indent([*lines, *self.info_lines, *errors])]

    def _describe_bucket(self, bucket: tuple[int, ...]) -> str:
        """Describe a bucket by its image size and its number of frames, or its reference images."""
        frames = f", {format_count(bucket[2], 'frame')}" if len(bucket) == 3 else references_in_words(bucket)
        if self.table.source.is_audio_only:
            return frames.removeprefix(", ")
        return f"{bucket[0]}x{bucket[1]}{frames}"


def group_by_stem(errors: Iterable[Fault], with_kind: bool = False) -> dict[str | None, list[str]]:
    """Group the texts of errors or warnings by the stem of their media file.

    `with_kind` prefixes each text with its kind.
    """
    texts: dict[str | None, list[str]] = {}
    for error in errors:
        text = error.text
        if with_kind and not error.kind.startswith("give no"):
            text = f"{error.kind}: {text}"
        texts.setdefault(error.stem, []).append(text)
    return texts


def references_in_words(bucket: tuple[int, ...]) -> str:
    """Describe the sizes of references in a bucket, for display after its size; "" without references."""
    sizes = [f"{width}x{height}" for width, height in zip(bucket[2::2], bucket[3::2], strict=False)]
    return f" with {' and '.join(sizes)}" if sizes else ""


@dataclass(frozen=True)
class TokenCounters:
    """Token counters of the text encoders, and lines about encoders that have no tokenizer here."""

    by_encoder: tuple[tuple[str, CountTokens], ...] = ()  # (name of the encoder, counter)
    missing_lines: tuple[str, ...] = ()  # about encoders whose tokens are not counted
    # encoder name -> error, for encoders whose tokenizer is missing and cannot be downloaded (offline)
    offline_errors: Mapping[str, str] = field(default_factory=dict)

    def find_offline_errors(self, names: Iterable[str]) -> list[Fault]:
        """Return an error for each named encoder whose tokenizer is missing in offline mode."""
        return [Fault(OFFLINE, self.offline_errors[name]) for name in names if name in self.offline_errors]

    def count(self, caption: str) -> list[tuple[str, TokenCount]]:
        """Return (encoder name, token count) pairs of a caption."""
        return [(name, count(caption)) for name, count in self.by_encoder]


NO_TOKEN_COUNTERS = TokenCounters()


@dataclass(frozen=True)
class CheckResult:
    """Findings of all tables, with the lines to print before and after them."""

    head: tuple[str, ...]
    tables: tuple[TableFindings, ...]
    tail: tuple[str, ...]
    counters: TokenCounters  # for the page

    @property
    def num_errors(self) -> int:
        """Total number of errors in all tables."""
        return sum(len(findings.errors) for findings in self.tables)

    @property
    def num_held_back(self) -> int:
        """Number of items held out for validation."""
        return sum(findings.validation_counts.total() for findings in self.tables)

    @property
    def num_warnings(self) -> int:
        """Total number of warnings in all tables."""
        return sum(len(findings.warnings) for findings in self.tables)

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return count_batches(self.tables)

    @property
    def exit_code(self) -> int:
        """0 without errors; SOURCES_LEFT_OUT if the run can continue without the faulty sources; else 1."""
        errors = [error for findings in self.tables for error in findings.errors]
        if os.environ.get(RUN_GOES_ON) and not any(error.is_fatal for error in errors):
            return SOURCES_LEFT_OUT if errors else 0
        return 1 if errors else 0

    @property
    def lines(self) -> list[str]:
        """All lines to print; the last one says whether the check passed."""
        verdict = "Nothing is wrong."
        if self.num_errors:
            verdict = f"Something is wrong: see above. Faults: {self.num_errors}."
        if self.num_warnings:
            verdict += f" Remarks above: {self.num_warnings}."
        table_lines = [line for findings in self.tables for line in findings.lines()]
        return [*self.head, *table_lines, *self.tail, verdict]


@dataclass(frozen=True)
class _BucketItem:
    """A training item with its table and source, as an argument for `split_validation`."""

    table: DatasetTable
    source_stem: str
    bucket: tuple[int, ...]


def count_validation_items(tables: Sequence[TableFindings], share: float, seed: int) -> None:
    """Count, for each table and bucket, the items that training would hold out for validation.

    `share` and `seed` are used for tables that do not set their own.
    """
    items = []
    for findings in tables:
        items += [_BucketItem(findings.table, stem, bucket) for stem, bucket in findings.item_buckets]
    findings_by_index = {findings.table.index: findings for findings in tables}
    _, validation_items = split_validation(items, share, seed)
    for item in validation_items:
        findings_by_index[item.table.index].validation_counts[item.bucket] += 1


def balance_regularization(tables: Sequence[TableFindings]) -> None:
    """Set how often regularization images repeat: an epoch gets as many of them as other images.

    Args:
        tables: Findings for all tables of a configuration.
    """
    # items in an epoch, by batch group: batches only mix tables of one group
    num_learned = Counter[int]()
    num_regularization = Counter[int]()
    for findings in tables:
        counts = num_regularization if findings.table.learning.is_reg else num_learned
        counts[findings.table.batch_group] += findings.num_items * findings.table.learning.num_repeats
    for findings in tables:
        group = findings.table.batch_group
        if findings.table.learning.is_reg and num_regularization[group]:
            findings.balancing_factor = num_learned[group] / num_regularization[group]


def count_batches(tables: Iterable[TableFindings]) -> int:
    """Return the number of training batches in an epoch; subsets of a dataset share batches.

    With regularization images the number is approximate, because they are assumed to be spread evenly over
    sizes.
    """
    # by batch group and bucket: items of one such key share batches
    num_items: dict[tuple[int, ...], float] = {}
    batch_sizes: dict[tuple[int, ...], int] = {}
    for findings in tables:
        table = findings.table
        trained = findings.num_items_by_bucket - findings.validation_counts
        for bucket, count in trained.items():
            key = (table.batch_group, *bucket)
            num_repeated = count * table.learning.num_repeats * findings.balancing_factor
            num_items[key] = num_items.get(key, 0) + num_repeated
            batch_sizes[key] = table.learning.batch_size
    # rounded first: `balancing_factor` is a quotient and may end in ...0001
    return sum(math.ceil(round(count, 6) / batch_sizes[key]) for key, count in num_items.items())


def indent(lines: Iterable[str]) -> list[str]:
    """Indent lines by two spaces."""
    return [f"  {line}" for line in lines]


def find_table(config: DatasetConfig, table: DatasetTable, folders: TableFolders) -> TableFindings:
    """Start the findings of a table: list its sources, the errors of listing them, and unused files.

    Only unused files that seem to be meant for use are reported. `folders` contains the folders of all
    tables.
    """
    findings = TableFindings(table)
    try:
        findings.sources = find_sources(table, faults=findings.errors)
    except DatasetError as error:
        findings.add_table_error(error)
        return findings
    findings.warnings += find_encodings(findings.sources)
    with contextlib.suppress(DatasetError):  # already reported by `find_sources`
        findings.warnings += find_unused(table)
    if table.references.rules is not None:
        _add_references(findings)
    if any(source.references or source.control_mask for source in findings.sources):
        from dataset.sources.companions import companion_lines  # only with companions

        findings.info_lines += companion_lines(findings.sources, findings.warnings)
    # preference pairs: a source with a rejected counterpart
    num_pairs = sum(source.rejected is not None for source in findings.sources)
    if num_pairs:
        findings.info_lines.append(f"pairs of a better and a worse one: {num_pairs}")
    unused_files = folders.left_out_files(table)
    if unused_files is not None:
        findings.warnings.append(Fault("folders have files that are not used", unused_files))
    # folders that no table uses are reported once, with the first table
    if table is config.datasets[0]:
        lines = folders.left_out_folders(config.datasets)
        findings.warnings += [Fault("folders are not searched", line) for line in lines]
    return findings


def _add_references(findings: TableFindings) -> None:
    """Count reference images; add a warning for each image without any if other images have some."""
    counts = count_references(findings.sources)
    if not counts:
        return
    words = ", ".join(f"{format_count(images, 'image')} with {number}" for number, images in counts)
    findings.info_lines.append(f"reference images: {words}")
    kind = "have no reference image, while others have"
    for source in findings.sources:
        if not source.control:
            findings.warnings.append(Fault(kind, str(source.path), source.stem))


def count_references(sources: Iterable[MediaSource]) -> list[tuple[int, int]]:
    """Return sorted (number of references, number of media files) pairs; [] without references."""
    counts = Counter(len(source.control) for source in sources)
    return sorted(counts.items()) if any(counts) else []


# --- captions
# ------------------------------------------------------------------------------------------------------------


def load_token_counters(text_encoders: Callable[[], Sequence[TextEncoder]]) -> TokenCounters:
    """Load the tokenizers that exist on this machine, for counting the tokens of captions."""
    from huggingface_hub import constants  # 0.1 s to import

    try:
        encoders = text_encoders()
    except (OptionError, CheckpointError) as error:
        return TokenCounters((), (f"tokens of captions are not counted, which is not an error: {error}",))
    counters = []
    missing_lines = []  # lines about tokenizers that are not on this machine
    offline_errors = {}  # encoder -> error, if offline mode forbids downloading its tokenizer
    for encoder in encoders:
        try:
            counters.append((encoder.name, encoder.token_counter()))
        except CheckpointError as error:
            missing_lines.append(f"tokens of {encoder.name} are not counted: {error}")
            if constants.HF_HUB_OFFLINE:
                offline_errors[encoder.name] = str(error)
    return TokenCounters(tuple(counters), tuple(missing_lines), offline_errors)


def check_captions(
    findings: TableFindings, counters: TokenCounters = NO_TOKEN_COUNTERS, are_cached: bool = True
) -> None:
    """Add findings about a table's captions: missing, empty or unusual ones, and those cut by an encoder.

    Unreadable captions are reported elsewhere. `are_cached` says that text embeddings are cached, so that
    their size is reported.
    """
    sources_without_caption = [
        source for source in findings.sources if source.caption is None and not has_unreadable_caption(source)
    ]
    for line, source in zip(missing_captions(sources_without_caption), sources_without_caption, strict=True):
        findings.errors.append(Fault(NO_CAPTION, line, source.stem))
    for source in findings.sources:
        if source.caption == "":
            path = source.caption_path or source.path
            findings.warnings.append(Fault("have an empty caption", str(path), source.stem))
    findings.warnings += find_caption_warnings(findings.sources)
    if not counters.by_encoder:  # without tokenizers it is not known which captions are cut
        return
    warnings, sizes_by_encoder = find_cut_captions(findings.sources, dict(counters.by_encoder))
    findings.warnings += warnings
    if are_cached:
        sees_references = findings.table.references.are_seen_by_texts
        # the size of the cached embeddings of each text encoder
        references = ", more with what it sees of references" if sees_references else ""
        for name, sizes in sizes_by_encoder.items():
            longest = max(sizes)
            if longest:
                total = format_size(sum(sizes))
                sizes_text = f"{total}, that of the longest caption {format_size(longest)}{references}"
                findings.info_lines.append(f"text caches of {name}: about {sizes_text}")


def has_unreadable_caption(source: MediaSource) -> bool:
    """Return whether a source has a caption file but no caption; listing the sources reports the error."""
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
            reason = _find_reason_not_to_convert(path, guess)
            if reason is None:
                assert guess is not None
                write_bytes(_get_backup_path(path), read_content(path, MAX_CAPTION_BYTES))
                write_text(path, guess.text.removeprefix("\ufeff"))
                converted.append(f"  {path}: was {guess.name}, now UTF-8: {_shorten(guess.text)!r}")
            else:
                left_unchanged.append(f"  {path}: unchanged: {reason}")
    counts = f"{format_count(len(converted), 'caption')} converted to UTF-8 (the old files end in {BACKUP})"
    return [f"{counts}, {len(left_unchanged)} left unchanged", *converted, *left_unchanged]


def _is_other_encoding(path: Path) -> bool:
    """Return whether a caption file may have an encoding other than UTF-8."""
    try:
        file = read_caption_file(path)
    except DatasetError:
        return path.is_file()
    return file is not None and file.encoding is not None


def _find_reason_not_to_convert(path: Path, guess: EncodingGuess | None) -> str | None:
    """Return why a caption file is not converted to UTF-8; None if its encoding is certain."""
    if guess is None or bad_character(guess.text):
        return "it is not text in that encoding"
    if not guess.is_sure:
        return (
            f"it may be {guess.name}: {_shorten(guess.text)!r}. If that is right, name it: "
            f"--repair_captions {guess.encoding}"
        )
    backup = _get_backup_path(path)
    return f"{backup.name} exists already; move it away" if backup.exists() else None


def _get_backup_path(path: Path) -> Path:
    """Return the path of a caption's backup."""
    return path.with_name(path.name + BACKUP)


def _shorten(text: str) -> str:
    """Return the beginning of a caption in one line, for messages."""
    return " ".join(text.split())[:SHOWN]


def _decode(path: Path, encoding: str) -> EncodingGuess | None:
    """Decode a caption file with an encoding; None if its bytes are invalid in this encoding."""
    try:
        return EncodingGuess(encoding, read_content(path, MAX_CAPTION_BYTES).decode(encoding), is_sure=True)
    except (OSError, ValueError):
        return None
