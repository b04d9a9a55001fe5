"""Encoding the captions that have no valid text cache. One file per source serves all its items and holds all encoders' tensors."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.cache_files import (
    FORMAT_VERSION,
    Entry,
    Header,
    checksum,
    read_entry,
    tensor_key,
    tensor_name,
    text_file_name,
    write_tensors,
)
from dataset.cache_records import FileIdentity, TextRecord, difference, identify, text_metadata, text_records, verify_tensors
from dataset.latent_caching import without_nan
from dataset.prefetch import WriteBehind, run_ahead
from dataset.source_jobs import progress
from dataset.sources import Source
from modules.errors import CacheError
from modules.family import Family, TextEncoder
from modules.records import Conditions, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Present:
    """A file that is kept."""

    has_record: bool


class TextEncoding:
    """The text encoders' passes over this process's sources. Afterwards its counters say what was done, in files and encoders."""

    def __init__(
        self, family: Family, device: torch.device, batch_size: int | None, workers: int, skip_existing: bool, show_progress: bool
    ) -> None:
        self.written = self.kept = self.foreign = 0
        self._family = family
        self._device = device
        self._batch_size = batch_size
        self._workers = workers
        self._skip_existing = skip_existing
        self._show_progress = show_progress

    def run(self, encoder: TextEncoder, sources: Sequence[Source]) -> None:
        """Encode with one encoder what it has not encoded yet; the encoder is loaded only where there is something to do."""
        identity = dict(encoder.identity)
        to_do: list[Source] = []

        def compare(source: Source) -> _Present | None:
            return find_present(self._path(source), source, encoder, identity, self._skip_existing)

        for source, found in run_ahead(sources, compare, self._workers, lambda _: 0, limit_bytes=1):
            if isinstance(found, Exception):
                raise found
            if found is None:
                to_do.append(source)
            else:
                self.kept += 1
                self.foreign += not found.has_record
        logger.info("%s: %d captions, %d of them to encode", encoder.name, len(sources), len(to_do))
        if not to_do:
            return
        encoder.load(self._device)
        try:
            with progress(len(to_do), encoder.name, "caption", self._show_progress) as bar:
                self._encode(encoder, identity, sources, to_do, bar)
        finally:
            encoder.free()

    def _encode(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        sources: Sequence[Source],
        to_do: Sequence[Source],
        bar: "tqdm[None]",
    ) -> None:
        """Encode every batch of `sources` in which something is to do, and write that.

        Whole batches, because the last bits of an embedding depend on its neighbours: so a run that was killed ends as one that
        was not.
        """
        paths = {self._path(source) for source in to_do}
        with WriteBehind() as writer, torch.no_grad():
            for batch in _batches(sources, self._batch_size):
                missing = [source for source in batch if self._path(source) in paths]
                if not missing:
                    continue
                encoded = encoder.encode([Prompt(source.caption or "") for source in batch])
                for source, conditions in zip(batch, encoded, strict=True):
                    if source not in missing:
                        continue
                    tensors = _named_tensors(conditions, encoder, source.stem)
                    record = TextRecord(identity, source.caption or "", _caption_file(source), crc32={})
                    writer.submit(partial(write_text, self._path(source), tensors, encoder.name, record, self._family.name))
                    self.written += 1
                bar.update(len(missing))

    def _path(self, source: Source) -> Path:
        return source.table.cache_directory / text_file_name(source.stem, self._family.cache_tag)


def find_present(
    path: Path, source: Source, encoder: TextEncoder, identity: Mapping[str, str], skip_existing: bool
) -> _Present | None:
    """The file of a source where it holds what `encoder` would write; else None, so that it is made again."""
    if not path.exists():
        return None
    try:
        entry = read_entry(path)
        records = text_records(entry.header)
        if records:
            record = records.get(encoder.name)
            if record is None:
                return None
            changed = difference(record.encoder, identity) or difference({"caption": record.caption}, {"caption": source.caption})
            verify_tensors(entry, record.crc32)
            if changed is None:
                return _Present(has_record=True)
            logger.debug("%s: %s", path, changed)
        elif skip_existing and _is_foreign(entry.header, encoder, source.caption):
            return _Present(has_record=False)
    except CacheError as error:
        logger.warning("%s. It is made again.", error)
    return None


def write_text(path: Path, tensors: Mapping[str, Tensor], encoder: str, record: TextRecord, architecture: str) -> None:
    """Write one encoder's tensors (by their names in the file) into a text cache.

    Tensors of other names, other metadata and other encoders' records that are there already stay. A caption that has changed is
    replaced with a warning. Raises OutputError.
    """
    old = _existing(path)
    kept, metadata, records = {}, {}, {}
    if old is not None:
        new_keys = {tensor_key(name) for name in tensors}
        kept = {name: tensor for name, tensor in old.named.items() if tensor_key(name) not in new_keys}
        metadata, records = dict(old.header.metadata), text_records(old.header)
        before = metadata.get("caption1", record.caption)
        if before != record.caption:
            logger.warning("%s: the caption was %r, now it is %r; it is replaced", path, before, record.caption)
    sums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    records[encoder] = dataclasses.replace(record, crc32=sums)
    metadata |= {"architecture": architecture, "caption1": record.caption, "format_version": FORMAT_VERSION}
    write_tensors(path, {**kept, **tensors}, metadata | text_metadata(records))


def _existing(path: Path) -> Entry | None:
    try:
        entry = read_entry(path) if path.exists() else None
        if entry is not None:
            text_records(entry.header)
        return entry
    except CacheError as error:
        logger.warning("%s. It is replaced.", error)
        return None


def _is_foreign(header: Header, encoder: TextEncoder, caption: str | None) -> bool:
    """Whether a file without records holds this encoder's tensors (their keys begin with its name) of the same caption."""
    has_tensors = any(key.startswith(encoder.name) or key in encoder.variable_length for key in header.keys)
    return has_tensors and header.metadata.get("caption1", caption) == caption


def _named_tensors(conditions: Conditions, encoder: TextEncoder, stem: str) -> dict[str, Tensor]:
    """One prompt's outputs by their names in a file, on the CPU."""
    named = {}
    for key, value in conditions.items():
        tensor = (value[0] if isinstance(value, list) else value).detach().cpu()
        tensor = without_nan(tensor, stem, key)
        named[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
    return named


def _caption_file(source: Source) -> FileIdentity | None:
    return None if source.caption_path is None else identify(source.caption_path)


def _batches(sources: Sequence[Source], batch_size: int | None) -> list[Sequence[Source]]:
    """Consecutive sources of one table, as many as its batch size or `batch_size` says."""
    batches: list[list[Source]] = []
    for source in sources:
        last = batches[-1] if batches else None
        if last is None or last[0].table is not source.table or len(last) >= (batch_size or source.table.batch_size):
            batches.append([source])
        else:
            last.append(source)
    return [tuple(batch) for batch in batches]
