"""Encode the captions without a valid text cache.

One file per caption serves all items of its source and holds the tensors of all encoders. Each text encoder
runs in a pass of its own, because two of them would not fit into memory. Until the last pass, outputs go to a
`.part` beside the file; the last pass joins everything and gives it the file's name. So a file is always
complete.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache.files import (
    FORMAT_VERSION,
    PART,
    Entry,
    Header,
    checksum,
    part_name,
    tensor_key,
    tensor_name,
)
from dataset.cache.index import Indexes, fingerprint
from dataset.cache.records import (
    TextRecord,
    difference,
    identify,
    text_facts,
    text_metadata,
    text_records,
    text_records_of,
    verify_tensors,
)
from dataset.cache.store import CacheStore, Stores
from dataset.caching.caption_files import CaptionFile
from dataset.caching.latents import require_finite
from dataset.caching.planning import AT_ONCE, Caches
from dataset.caching.prefetch import WriteBehind, run_ahead
from dataset.caching.reports import NAMED
from dataset.sources.captions import describe_cut
from modules.bars import Bar
from modules.contract.data import Conditions
from modules.contract.family import TextEncoder
from modules.contract.generation import Prompt
from modules.errors import CacheError, CheckpointError

logger = logging.getLogger(__name__)

# in the order of their passes, each with its identity
Encoders = Sequence[tuple[TextEncoder, Mapping[str, str]]]


@dataclass(frozen=True)
class TextPlan:
    """What to do for one text, by names of encoders."""

    path: Path  # of its cache file
    missing: tuple[str, ...]  # those that must encode, in order
    in_part: tuple[str, ...]  # those whose outputs are valid in the unfinished file only
    is_foreign: bool  # whether valid outputs have no record: another program made them

    def is_last(self, encoder: str) -> bool:
        """Return whether the file is complete once this encoder has written."""
        return encoder == self.missing[-1]


def text_index(verify: bool = False) -> Indexes[dict[str, TextRecord]]:
    """Return what earlier runs have verified of text caches. verify: read all again."""
    return Indexes("texts", text_records_of, not verify)


@dataclass
class Texts:
    """The text caches of a run, and what is known of them."""

    stores: Stores
    skip_existing: bool  # outputs without a record are valid if the caption is the same
    index: Indexes[dict[str, TextRecord]] = field(default_factory=text_index)
    _parts: dict[Path, frozenset[str]] = field(default_factory=dict)
    _compared: dict[tuple[object, ...], str | None] = field(default_factory=dict)

    def has_part(self, file: CaptionFile) -> bool:
        """Whether a text had an unfinished file when the first one of its table was asked for."""
        folder = file.table.cache_directory
        if folder not in self._parts:
            names = self.stores.of(file.table).names()
            self._parts[folder] = frozenset(name for name in names if name.endswith(PART))
        parts = self._parts[folder]
        return bool(parts) and part_name(file.path.name) in parts

    def plan(self, file: CaptionFile, encoders: Encoders) -> TextPlan:
        """Compare a text's file, finished or not, with what the encoders would write. Nothing is changed."""
        name = file.path.name
        right, _ = self._right(name, file, encoders, self.skip_existing)
        part: dict[str, bool] = {}
        if self.has_part(file):
            part, others = self._right(part_name(name), file, encoders, skip_existing=False)
            if others:
                # it is from a run with other encoders or another caption: joining it would corrupt the valid
                # outputs
                part = {}
        names = [encoder.name for encoder, _ in encoders]
        return TextPlan(
            file.path,
            missing=tuple(name for name in names if name not in right and name not in part),
            in_part=tuple(name for name in names if name not in right and name in part),
            is_foreign=not all(right.values()),
        )

    def _right(
        self, name: str, file: CaptionFile, encoders: Encoders, skip_existing: bool
    ) -> tuple[dict[str, bool], frozenset[str]]:
        """Return the encoders whose outputs in a file are valid (name -> has a record), and all other
        records.

        Valid outputs are those that the encoder would write.
        """
        store, right = self.stores.of(file.table), dict[str, bool]()
        index, source = self.index.of(store), caption_fingerprint(file.caption)
        known = index.get(name, source)
        entry: Entry | None = None
        if known is None:
            stamp = store.stamp(name)
            if stamp is None:
                return right, frozenset()
            try:
                entry = store.read(name)
                records = text_records(entry.header)
            except CacheError as error:
                logger.warning("%s. It is made again.", error)
                return right, frozenset()
        else:
            records = known
        for encoder, identity in encoders:
            record = records.get(encoder.name)
            if record is None:
                if skip_existing and not file.settings and self._is_foreign(name, file, encoder, entry):
                    right[encoder.name] = False
                continue
            if entry is None:
                changed = self._known_difference(record, identity, file)
            else:
                changed = _difference(record, identity, file)
            if changed is not None:
                logger.debug("%s: %s", store.folder / name, changed)
                continue
            try:
                if entry is not None:
                    verify_tensors(entry, record.crc32)
                right[encoder.name] = True
            except CacheError as error:
                logger.warning("%s. It is made again.", error)
        if entry is not None and records and all(right.get(one) for one in records):
            index.note(name, stamp, source, text_facts(records))
        return right, frozenset(records.keys() - right.keys())

    def _known_difference(
        self, record: TextRecord, identity: Mapping[str, str], file: CaptionFile
    ) -> str | None:
        """Do as `_difference` for a record of the index, of which there are few for a million entries."""
        key = (id(record), id(identity), tuple(file.settings.items()))
        if key not in self._compared:
            same = dataclasses.replace(record, caption=file.caption or "")
            self._compared[key] = _difference(same, identity, dataclasses.replace(file, caption=same.caption))
        return self._compared[key]

    def _is_foreign(self, name: str, file: CaptionFile, encoder: TextEncoder, entry: Entry | None) -> bool:
        """Return whether a file without this encoder's record holds its tensors for the same caption."""
        header = self.stores.of(file.table).read_header(name) if entry is None else entry.header
        return encoder.keys <= header.keys and header.metadata.get("caption1", file.caption) == file.caption


def caption_fingerprint(caption: str | None) -> int:
    """Return what tells a text from others."""
    return fingerprint((), caption or "")


def _difference(record: TextRecord, identity: Mapping[str, str], file: CaptionFile) -> str | None:
    return difference(record.encoder, identity) or difference(
        {"caption": record.caption, **record.settings}, {"caption": file.caption, **file.settings}
    )


class TextEncoding:
    """The text encoders' passes over this process's texts, with counters of files.

    written: files to which an encoder added something. kept: all others. foreign: files with outputs that
    have no record.
    """

    def __init__(
        self,
        family: Caches,
        device: torch.device,
        batch_size: int | None,
        workers: int,
        show_progress: bool,
        texts: Texts,
    ) -> None:
        self.written = self.kept = self.foreign = 0
        self._family = family
        self._device = device
        self._batch_size = batch_size
        self._workers = workers
        self._show_progress = show_progress
        self._texts = texts
        self._stores = texts.stores

    def run(self, files: Sequence[CaptionFile]) -> None:
        """Encode what is missing, one encoder after the other; an encoder without work is not loaded."""
        encoders = [(encoder, dict(encoder.identity)) for encoder in self._family.text_encoders()]
        plans = self._plan(files, encoders)
        for encoder, identity in encoders:
            to_do = {plan.path: plan for plan in plans if encoder.name in plan.missing}
            logger.info("%s: %d captions, %d of them to encode", encoder.name, len(files), len(to_do))
            if not to_do:
                continue
            encoder.load(self._device)
            warn_cut_captions(encoder, [file for file in files if file.path in to_do])
            try:
                with Bar(len(to_do), f"Encoding with {encoder.name}", "caption", self._show_progress) as bar:
                    self._encode(encoder, identity, files, to_do, bar)
            finally:
                encoder.free()

    def _plan(self, files: Sequence[CaptionFile], encoders: Encoders) -> list[TextPlan]:
        """Compare all texts with their files; return what is to do.

        Finish or remove unfinished files that need nothing else.
        """

        def compare(some: Sequence[CaptionFile]) -> list[tuple[CaptionFile, TextPlan]]:
            return [(file, self._texts.plan(file, encoders)) for file in some]

        jobs = [files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE)]
        plans = []
        for _, compared in run_ahead(jobs, compare, self._workers, lambda _: 0, limit_bytes=1):
            if isinstance(compared, Exception):
                raise compared
            for file, plan in compared:
                self.foreign += plan.is_foreign
                if plan.missing or plan.in_part:
                    self.written += 1
                    plans.append(plan)
                else:
                    self.kept += 1
                if not self._texts.has_part(file):
                    continue
                store, name = self._stores.of(file.table), plan.path.name
                if not plan.in_part:
                    store.remove(part_name(name))  # nothing in it is valid, or nothing in it is needed
                elif not plan.missing:
                    finish_text(store, name)  # an earlier run was stopped before it could do so
        return plans

    def _encode(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        files: Sequence[CaptionFile],
        to_do: Mapping[Path, TextPlan],
        bar: Bar,
    ) -> None:
        """Encode every batch of `files` in which something is missing, and write what is missing.

        Batches stay whole, because the last bits of an embedding depend on its neighbours: so a run that was
        killed and continued gives the same files as an uninterrupted one.
        """
        with WriteBehind() as writer, torch.no_grad():
            for batch in _batches(files, self._batch_size):
                missing = {file.path for file in batch if file.path in to_do}
                if not missing:
                    continue
                encoded = encoder.encode([Prompt(file.caption or "") for file in batch])
                for file, conditions in zip(batch, encoded, strict=True):
                    if file.path not in missing:
                        continue
                    path = file.path
                    tensors = _named_tensors(conditions, encoder, file.name)
                    source = None if file.caption_path is None else identify(file.caption_path)
                    record = TextRecord(identity, file.caption or "", source, {}, file.settings)
                    is_last = to_do[path].is_last(encoder.name)
                    writer.submit(partial(self._write, file, tensors, encoder.name, record, is_last))
                bar.update(len(missing))

    def _write(
        self,
        file: CaptionFile,
        tensors: Mapping[str, Tensor],
        encoder: str,
        record: TextRecord,
        is_last: bool,
    ) -> None:
        store, name = self._stores.of(file.table), file.path.name
        written = write_text(store, name, tensors, encoder, record, self._family.name, is_last)
        records = text_records(written)
        if is_last and all(one.caption == record.caption for one in records.values()):
            source, facts = caption_fingerprint(record.caption), text_facts(records)
            self._texts.index.of(store).note_written(name, store.stamp(name), source, facts)


def warn_cut_captions(encoder: TextEncoder, files: Sequence[CaptionFile]) -> None:
    """Warn about captions with more tokens than the encoder reads: their ends are not used."""
    try:
        count_tokens = encoder.token_counter()
    except CheckpointError as error:
        logger.info("tokens of the captions are not counted: %s", error)
        return
    number = 0
    lines: list[str] = []
    for file in files:
        count = count_tokens(file.caption or "")
        number += count.is_cut
        if count.is_cut and len(lines) < NAMED:
            lines.append(describe_cut(file.caption_path or file.name, encoder.name, count))
    if number:
        logger.warning(
            "%d of %d captions are longer than %s reads; the rest of them is not used. The first:\n  %s",
            number,
            len(files),
            encoder.name,
            "\n  ".join(lines),
        )


def write_text(
    store: CacheStore,
    name: str,
    tensors: Mapping[str, Tensor],
    encoder: str,
    record: TextRecord,
    architecture: str,
    is_last: bool = True,
) -> Header:
    """Write one encoder's tensors (by their names in the file) to a text cache: to its `.part` or the file.

    is_last: no other encoder adds anything, so the tensors are joined with the content of the `.part` and the
    file. Tensors with other names, other metadata and other encoders' records are kept. A changed caption is
    replaced with a warning. Returns the header of what was written. Raises OutputError if writing fails.
    """
    sums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    metadata = {"architecture": architecture, "caption1": record.caption, "format_version": FORMAT_VERSION}
    metadata |= text_metadata({encoder: dataclasses.replace(record, crc32=sums)})
    part, path = part_name(name), store.folder / name
    new = Entry(Header(path, metadata, tuple(tensors)), tensors)
    unfinished = _require_existing(store, part)
    if unfinished is not None:
        new = _join(unfinished, new)
    if not is_last:
        store.write(part, new.named, new.header.metadata)
        return new.header
    old = _require_existing(store, name)
    if old is not None:
        before = old.header.metadata.get("caption1", record.caption)
        if before != record.caption:
            logger.warning(
                "%s: the caption was %r, now it is %r; it is replaced", path, before, record.caption
            )
        new = _join(old, new)
    if unfinished is None:
        store.write(name, new.named, new.header.metadata)
    else:
        store.write(part, new.named, new.header.metadata)
        store.rename(part, name)
    return new.header


def finish_text(store: CacheStore, name: str) -> None:
    """Join a text cache with its `.part`, if nothing is left to encode.

    Raises CacheError if the `.part` is damaged, OutputError if writing fails.
    """
    part = part_name(name)
    old, new = _require_existing(store, name), store.read(part)
    if old is not None:
        new = _join(old, new)
        store.write(part, new.named, new.header.metadata)
    store.rename(part, name)


def _join(old: Entry, new: Entry) -> Entry:
    """Join two entries; the new one wins if both have something."""
    new_keys = new.header.keys
    kept = {name: tensor for name, tensor in old.named.items() if tensor_key(name) not in new_keys}
    named = {**kept, **new.named}
    records = text_metadata({**text_records(old.header), **text_records(new.header)})
    metadata = {**old.header.metadata, **new.header.metadata, **records}
    return Entry(Header(new.header.path, metadata, tuple(named)), named)


def _require_existing(store: CacheStore, name: str) -> Entry | None:
    try:
        entry = store.read(name) if store.has(name) else None
        if entry is not None:
            text_records(entry.header)
        return entry
    except CacheError as error:
        logger.warning("%s. It is replaced.", error)
        return None


def _named_tensors(conditions: Conditions, encoder: TextEncoder, stem: str) -> dict[str, Tensor]:
    """Return one prompt's outputs by their names in a file, on the CPU."""
    named = {}
    for key, value in conditions.items():
        tensor = (value[0] if isinstance(value, list) else value).detach().cpu()
        require_finite(tensor, stem, key)
        named[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
    return named


def _batches(files: Sequence[CaptionFile], batch_size: int | None) -> list[Sequence[CaptionFile]]:
    """Group consecutive texts of one table and kind by `batch_size`, or by the table's batch size."""
    batches: list[list[CaptionFile]] = []
    for file in files:
        last = batches[-1] if batches else None
        if (
            last is None
            or last[0].table is not file.table
            or last[0].pass_over != file.pass_over
            or len(last) >= (batch_size or file.table.batch_size)
        ):
            batches.append([file])
        else:
            last.append(file)
    return [tuple(batch) for batch in batches]
