"""Plan the text caches: which encoders' outputs are valid, in finished and unfinished files, and which are
missing.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.cache.files import PART, Entry, Header, empty_text_name, part_name, text_file_name
from dataset.cache.index import Indexes, fingerprint
from dataset.cache.records import (
    TextRecord,
    difference,
    text_facts,
    text_records,
    text_records_of,
    verify_tensors,
)
from dataset.cache.store import CacheStore, Stamp, Stores
from dataset.config import DatasetTable
from dataset.sources.media_source import MediaSource, pause_collection
from modules.contract.family import TextEncoder
from modules.errors import CacheError


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """One text, and the cache file of its embeddings. There may be a million."""

    table: DatasetTable
    file_name: str  # of the cache file
    name: str  # for messages
    caption: str | None
    caption_path: Path | None  # the text file it is from, there or not
    settings: Mapping[str, Any] = field(default_factory=dict)  # as in `TextRecord`
    pass_over: int = 0  # 0: the first captions of a table, 1: further ones, 2: the empty prompt
    embeds: Path | None = None  # what text encoders gave for it, computed before

    @property
    def path(self) -> Path:
        """Return the path of the cache file."""
        return self.table.cache_directory / self.file_name


def list_caption_files(sources: Sequence[MediaSource], tag: str) -> list[CaptionFile]:
    """Return the texts of all sources, table by table: first captions, further ones, then the empty prompt.

    First captions come first, so that their batches are those of a table without more texts.
    """
    tables: dict[int, list[MediaSource]] = {}
    for source in sources:
        tables.setdefault(source.table.index, []).append(source)
    with pause_collection():
        return [one for found in tables.values() for one in _files_of_table(found[0].table, found, tag)]


def _files_of_table(table: DatasetTable, sources: Sequence[MediaSource], tag: str) -> list[CaptionFile]:
    files = []
    alone = table.caption_settings
    for source in sources:
        captions = (source.caption, *source.more_captions)
        settings = alone if len(captions) == 1 else {**alone, "captions": len(captions)}
        for number, caption in enumerate(captions):
            path = text_file_name(source.stem, tag, number)
            embeds = None if source.tensors is None or number else source.tensors.embeds
            pass_over = min(number, 1)
            files.append(
                CaptionFile(
                    table, path, source.stem, caption, source.caption_path, settings, pass_over, embeds
                )
            )
    if table.drops_captions:
        path = empty_text_name(tag)
        files.append(CaptionFile(table, path, "the empty prompt", "", None, pass_over=2))
    return sorted(files, key=lambda file: file.pass_over)


logger = logging.getLogger(__name__)

# in the order of their passes, each with its identity
Encoders = Sequence[tuple[TextEncoder, Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class EncodingPlan:
    """Plan for one text, by names of encoders."""

    file: CaptionFile
    missing: tuple[str, ...]  # those that must encode, in order
    in_part: tuple[str, ...]  # those whose outputs are valid in the unfinished file only
    is_foreign: bool  # whether valid outputs have no record: another program made them
    is_known: bool = False  # to be whole, and without an unfinished file

    @property
    def path(self) -> Path:
        """Return the path of its cache file."""
        return self.file.path

    def is_last(self, encoder: str) -> bool:
        """Return whether the file is complete once this encoder has written."""
        return encoder == self.missing[-1]


@dataclass(frozen=True)
class Wanted:
    """Required content of one text's cache file: the caption, and the encoders' outputs for it."""

    file: CaptionFile
    encoders: Encoders
    skip_existing: bool  # outputs without a record count as valid if the caption is the same

    @property
    def name(self) -> str:
        """Return the name of the cache file."""
        return self.file.file_name


@dataclass(frozen=True)
class FoundTexts:
    """The wanted texts in a cache file, finished or not."""

    entry: Entry | None = None  # None: it is missing or damaged
    right: Mapping[str, bool] = field(default_factory=dict)  # encoders with valid outputs: has it a record?


def text_index(verify: bool = False) -> Indexes[dict[str, TextRecord]]:
    """Return the facts about text caches that earlier runs verified. verify: read all again."""
    return Indexes("texts", text_records_of, not verify)


@dataclass
class KnownTexts:
    """Facts about the text caches of a run without reading them."""

    stores: Stores
    index: Indexes[dict[str, TextRecord]]
    trusts: bool = False  # shared files that are there are taken to be right, unread
    _parts: dict[Path, frozenset[str]] = field(default_factory=dict)  # unfinished files by folder
    _compared: dict[tuple[object, ...], bool] = field(default_factory=dict)

    def is_whole(self, wanted: Wanted) -> bool:
        """Return whether a text's file is unchanged since it was verified, and holds all encoders' outputs.

        False if that is not known, or if there was an unfinished file when the first text of the table was
        asked for.
        """
        file = wanted.file
        store = self.stores.of(file.table)
        records = self.index.of(store).get(wanted.name, caption_fingerprint(file))
        if records is None or self._has_part(store, wanted.name):
            return False
        key = (id(records), id(wanted.encoders), tuple(file.settings.items()))
        if key not in self._compared:
            self._compared[key] = all(
                encoder.name in records
                and _difference(
                    dataclasses.replace(records[encoder.name], caption=file.caption or ""), one, file
                )
                is None
                for encoder, one in wanted.encoders
            )
        return self._compared[key]

    def note(self, wanted: Wanted, entry: Entry, stamp: Stamp | None) -> None:
        """Remember a file that was just read and holds all encoders' outputs."""
        facts = self._facts(wanted, text_records(entry.header))
        if facts is not None:
            index = self.index.of(self.stores.of(wanted.file.table))
            index.note(wanted.name, stamp, caption_fingerprint(wanted.file), facts)

    def note_written(self, wanted: Wanted, header: Header) -> None:
        """Remember a file that was just written."""
        store = self.stores.of(wanted.file.table)
        facts = self._facts(wanted, text_records(header))
        if facts is not None:
            source, stamp = caption_fingerprint(wanted.file), store.stamp(wanted.name)
            self.index.of(store).note_written(wanted.name, stamp, source, facts)

    def _facts(self, wanted: Wanted, records: Mapping[str, TextRecord]) -> dict[str, Any] | None:
        """Return the index's facts about a file: none if it has records of other encoders or captions."""
        names = {encoder.name for encoder, _ in wanted.encoders}
        same = all(record.caption == (wanted.file.caption or "") for record in records.values())
        return text_facts(records) if same and records.keys() == names else None

    def _has_part(self, store: CacheStore, name: str) -> bool:
        if store.folder not in self._parts:
            self._parts[store.folder] = frozenset(one for one in store.names() if one.endswith(PART))
        parts = self._parts[store.folder]
        return bool(parts) and part_name(name) in parts


def caption_fingerprint(file: CaptionFile) -> int:
    """Return the fingerprint of a text's caption."""
    return fingerprint((), file.caption or "")


def plan_text(
    store: CacheStore,
    file: CaptionFile,
    encoders: Encoders,
    skip_existing: bool,
    known: KnownTexts | None = None,
) -> EncodingPlan:
    """Compare a text's file, finished or not, with the encoders' outputs. Nothing is changed.

    known: of the run, so that files known to be right are not read.
    """
    wanted = Wanted(file, encoders, skip_existing)
    if known is not None and known.trusts and store.is_shared(wanted.name) and store.has(wanted.name):
        return EncodingPlan(file, (), (), is_foreign=True, is_known=True)
    if known is not None and known.is_whole(wanted):
        return EncodingPlan(file, (), (), is_foreign=False, is_known=True)
    part = find_part(store, wanted).right  # before the file, as another process may finish it now
    stamp = store.stamp(wanted.name)
    is_trusted = store.is_shared(wanted.name) and (known is None or known.index.is_trusted)
    found = find_finished(store, wanted, has_values=not is_trusted)
    right = found.right
    if known is not None and found.entry is not None and all(right.get(one.name) for one, _ in encoders):
        known.note(wanted, found.entry, stamp)
    names = [encoder.name for encoder, _ in encoders]
    return EncodingPlan(
        file,
        missing=tuple(name for name in names if name not in right and name not in part),
        in_part=tuple(name for name in names if name not in right and name in part),
        is_foreign=not all(right.values()),
    )


def find_finished(store: CacheStore, wanted: Wanted, has_values: bool = True) -> FoundTexts:
    """Compare the finished file of a text with the wanted outputs.

    has_values: False compares without reading the tensors; the result then has no values.
    """
    return _find(store, wanted.name, wanted, wanted.skip_existing, has_values)[0]


def find_part(store: CacheStore, wanted: Wanted) -> FoundTexts:
    """Compare the unfinished file of a text with the wanted outputs.

    If anything in it is from a run with other encoders or another caption, joining it would corrupt the valid
    outputs: then nothing is found.
    """
    found, others = _find(store, part_name(wanted.name), wanted, skip_existing=False)
    return FoundTexts() if others or not found.right else found


def _find(
    store: CacheStore, name: str, wanted: Wanted, skip_existing: bool, has_values: bool = True
) -> tuple[FoundTexts, frozenset[str]]:
    """Return the wanted outputs in a file, and the encoders of all other records in it.

    skip_existing: outputs without a record are valid if the caption is the same.
    """
    right: dict[str, bool] = {}
    file = wanted.file
    if not store.has(name):
        return FoundTexts(), frozenset()
    try:
        entry = store.read(name) if has_values else Entry(store.read_header(name), {})
        records = text_records(entry.header)
    except CacheError as error:
        if store.has(name):  # else another process has removed it since
            logger.warning("%s. It is made again.", error)
        return FoundTexts(), frozenset()
    for encoder, identity in wanted.encoders:
        record = records.get(encoder.name)
        if record is None:
            # what a shared one does not say is not asked for: other programs keep no record
            accepts = store.is_shared(name) or (skip_existing and not file.settings)
            if accepts and _is_foreign(entry.header, encoder, file.caption):
                right[encoder.name] = False
            continue
        changed = _difference(record, identity, file)
        if changed is not None:
            logger.debug("%s: %s", store.folder / name, changed)
            continue
        try:
            if has_values:
                verify_tensors(entry, record.crc32)
            right[encoder.name] = True
        except CacheError as error:
            logger.warning("%s. It is made again.", error)
    return FoundTexts(entry, right), frozenset(records.keys() - right.keys())


def _difference(record: TextRecord, identity: Mapping[str, str], file: CaptionFile) -> str | None:
    return difference(record.encoder, identity) or difference(
        {"caption": record.caption, **record.settings}, {"caption": file.caption, **file.settings}
    )


def _is_foreign(header: Header, encoder: TextEncoder, caption: str | None) -> bool:
    """Return whether a file without this encoder's record holds its tensors for the same caption."""
    return encoder.keys <= header.keys and header.metadata.get("caption1", caption) == caption
