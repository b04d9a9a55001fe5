"""Encode the captions without a valid text cache.

One file per source serves all its items and holds the tensors of all encoders. Each text encoder runs in a
pass of its own, because two of them would not fit into memory. Until the last pass, outputs go to a `.part`
beside the file; the last pass joins everything and gives it the file's name. So a file is always complete.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache.files import (
    FORMAT_VERSION,
    Entry,
    Header,
    checksum,
    part_path,
    read_entry,
    tensor_key,
    tensor_name,
    text_file_name,
    write_tensors,
)
from dataset.cache.records import (
    FileIdentity,
    TextRecord,
    difference,
    identify,
    text_metadata,
    text_records,
    verify_tensors,
)
from dataset.caching.latents import require_finite
from dataset.caching.planning import Caches
from dataset.caching.prefetch import WriteBehind, run_ahead
from dataset.caching.reports import NAMED
from dataset.sources.captions import describe_cut
from dataset.sources.listing import MediaSource
from modules.atomic_write import give_name
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
    """What to do for one source, by names of encoders."""

    source: MediaSource
    path: Path  # of its cache file
    missing: tuple[str, ...]  # those that must encode, in order
    in_part: tuple[str, ...]  # those whose outputs are valid in the unfinished file only
    is_foreign: bool  # whether valid outputs have no record: another program made them

    def is_last(self, encoder: str) -> bool:
        """Return whether the file is complete once this encoder has written."""
        return encoder == self.missing[-1]


def plan_text(source: MediaSource, tag: str, encoders: Encoders, skip_existing: bool) -> TextPlan:
    """Compare a source's file, finished or not, with what the encoders would write. Nothing is changed."""
    path = source.table.cache_directory / text_file_name(source.stem, tag)
    right, _ = _right(path, source, encoders, skip_existing)
    part, others = _right(part_path(path), source, encoders, skip_existing=False)
    if others:
        # it is from a run with other encoders or another caption: joining it would corrupt the valid outputs
        part = {}
    names = [encoder.name for encoder, _ in encoders]
    return TextPlan(
        source,
        path,
        missing=tuple(name for name in names if name not in right and name not in part),
        in_part=tuple(name for name in names if name not in right and name in part),
        is_foreign=not all(right.values()),
    )


class TextEncoding:
    """The text encoders' passes over this process's sources, with counters of files.

    written: files to which an encoder added something. kept: all others. foreign: files with outputs that
    have no record.
    """

    def __init__(
        self,
        family: Caches,
        device: torch.device,
        batch_size: int | None,
        workers: int,
        skip_existing: bool,
        show_progress: bool,
    ) -> None:
        self.written = self.kept = self.foreign = 0
        self._family = family
        self._device = device
        self._batch_size = batch_size
        self._workers = workers
        self._skip_existing = skip_existing
        self._show_progress = show_progress

    def run(self, sources: Sequence[MediaSource]) -> None:
        """Encode what is missing, one encoder after the other; an encoder without work is not loaded."""
        encoders = [(encoder, dict(encoder.identity)) for encoder in self._family.text_encoders()]
        plans = self._plan(sources, encoders)
        for encoder, identity in encoders:
            to_do = {plan.path: plan for plan in plans if encoder.name in plan.missing}
            logger.info("%s: %d captions, %d of them to encode", encoder.name, len(sources), len(to_do))
            if not to_do:
                continue
            encoder.load(self._device)
            warn_cut_captions(encoder, [plan.source for plan in to_do.values()])
            try:
                with Bar(len(to_do), f"Encoding with {encoder.name}", "caption", self._show_progress) as bar:
                    self._encode(encoder, identity, sources, to_do, bar)
            finally:
                encoder.free()

    def _plan(self, sources: Sequence[MediaSource], encoders: Encoders) -> list[TextPlan]:
        """Compare all sources with their files. Finish or remove unfinished files that need nothing else."""

        def compare(source: MediaSource) -> TextPlan:
            return plan_text(source, self._family.cache_tag, encoders, self._skip_existing)

        plans = []
        for _, plan in run_ahead(sources, compare, self._workers, lambda _: 0, limit_bytes=1):
            if isinstance(plan, Exception):
                raise plan
            plans.append(plan)
            self.foreign += plan.is_foreign
            if plan.missing or plan.in_part:
                self.written += 1
            else:
                self.kept += 1
            if not plan.in_part:
                # nothing in it is valid, or nothing in it is needed
                part_path(plan.path).unlink(missing_ok=True)
            elif not plan.missing:
                finish_text(plan.path)  # an earlier run was stopped before it could do so
        return plans

    def _encode(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        sources: Sequence[MediaSource],
        to_do: Mapping[Path, TextPlan],
        bar: Bar,
    ) -> None:
        """Encode every batch of `sources` in which something is missing, and write what is missing.

        Batches stay whole, because the last bits of an embedding depend on its neighbours: so a run that was
        killed and continued gives the same files as an uninterrupted one.
        """
        with WriteBehind() as writer, torch.no_grad():
            for batch in _batches(sources, self._batch_size):
                missing = [source for source in batch if self._path(source) in to_do]
                if not missing:
                    continue
                encoded = encoder.encode([Prompt(source.caption or "") for source in batch])
                for source, conditions in zip(batch, encoded, strict=True):
                    if source not in missing:
                        continue
                    tensors = _named_tensors(conditions, encoder, source.stem)
                    record = TextRecord(identity, source.caption or "", _caption_file(source), crc32={})
                    path = self._path(source)
                    is_last = to_do[path].is_last(encoder.name)
                    writer.submit(
                        partial(write_text, path, tensors, encoder.name, record, self._family.name, is_last)
                    )
                bar.update(len(missing))

    def _path(self, source: MediaSource) -> Path:
        return source.table.cache_directory / text_file_name(source.stem, self._family.cache_tag)


def warn_cut_captions(encoder: TextEncoder, sources: Sequence[MediaSource]) -> None:
    """Warn about captions with more tokens than the encoder reads: their ends are not used."""
    try:
        count_tokens = encoder.token_counter()
    except CheckpointError as error:
        logger.info("tokens of the captions are not counted: %s", error)
        return
    number = 0
    lines: list[str] = []
    for source in sources:
        count = count_tokens(source.caption or "")
        number += count.is_cut
        if count.is_cut and len(lines) < NAMED:
            lines.append(describe_cut(source.caption_path or source.path, encoder.name, count))
    if number:
        logger.warning(
            "%d of %d captions are longer than %s reads; the rest of them is not used. The first:\n  %s",
            number,
            len(sources),
            encoder.name,
            "\n  ".join(lines),
        )


def write_text(
    path: Path,
    tensors: Mapping[str, Tensor],
    encoder: str,
    record: TextRecord,
    architecture: str,
    is_last: bool = True,
) -> None:
    """Write one encoder's tensors (by their names in the file) to a text cache: to its `.part` or the file.

    is_last: no other encoder adds anything, so the tensors are joined with the content of the `.part` and the
    file. Tensors with other names, other metadata and other encoders' records are kept. A changed caption is
    replaced with a warning. Raises OutputError if writing fails.
    """
    sums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    metadata = {"architecture": architecture, "caption1": record.caption, "format_version": FORMAT_VERSION}
    metadata |= text_metadata({encoder: dataclasses.replace(record, crc32=sums)})
    part = part_path(path)
    new = Entry(Header(path, metadata, tuple(tensors)), tensors)
    unfinished = _require_existing(part)
    if unfinished is not None:
        new = _join(unfinished, new)
    if not is_last:
        write_tensors(part, new.named, new.header.metadata)
        return
    old = _require_existing(path)
    if old is not None:
        before = old.header.metadata.get("caption1", record.caption)
        if before != record.caption:
            logger.warning(
                "%s: the caption was %r, now it is %r; it is replaced", path, before, record.caption
            )
        new = _join(old, new)
    if unfinished is None:
        write_tensors(path, new.named, new.header.metadata)
    else:
        write_tensors(part, new.named, new.header.metadata)
        give_name(part, path)


def finish_text(path: Path) -> None:
    """Join a text cache with its `.part`, if nothing is left to encode.

    Raises CacheError if the `.part` is damaged, OutputError if writing fails.
    """
    part = part_path(path)
    old, new = _require_existing(path), read_entry(part)
    if old is not None:
        new = _join(old, new)
        write_tensors(part, new.named, new.header.metadata)
    give_name(part, path)


def _join(old: Entry, new: Entry) -> Entry:
    """Join two entries; the new one wins if both have something."""
    new_keys = new.header.keys
    kept = {name: tensor for name, tensor in old.named.items() if tensor_key(name) not in new_keys}
    named = {**kept, **new.named}
    records = text_metadata({**text_records(old.header), **text_records(new.header)})
    metadata = {**old.header.metadata, **new.header.metadata, **records}
    return Entry(Header(new.header.path, metadata, tuple(named)), named)


def _right(
    path: Path, source: MediaSource, encoders: Encoders, skip_existing: bool
) -> tuple[dict[str, bool], frozenset[str]]:
    """Return the encoders whose outputs in a file are valid (name -> has a record), and all other records.

    Valid outputs are those that the encoder would write. skip_existing: outputs without a record are valid if
    the caption is the same.
    """
    right: dict[str, bool] = {}
    if not path.exists():
        return right, frozenset()
    try:
        entry = read_entry(path)
        records = text_records(entry.header)
    except CacheError as error:
        logger.warning("%s. It is made again.", error)
        return right, frozenset()
    for encoder, identity in encoders:
        record = records.get(encoder.name)
        if record is None:
            if skip_existing and _is_foreign(entry.header, encoder, source.caption):
                right[encoder.name] = False
            continue
        changed = difference(record.encoder, identity) or difference(
            {"caption": record.caption}, {"caption": source.caption}
        )
        if changed is not None:
            logger.debug("%s: %s", path, changed)
            continue
        try:
            verify_tensors(entry, record.crc32)
            right[encoder.name] = True
        except CacheError as error:
            logger.warning("%s. It is made again.", error)
    return right, frozenset(records.keys() - right.keys())


def _require_existing(path: Path) -> Entry | None:
    try:
        entry = read_entry(path) if path.exists() else None
        if entry is not None:
            text_records(entry.header)
        return entry
    except CacheError as error:
        logger.warning("%s. It is replaced.", error)
        return None


def _is_foreign(header: Header, encoder: TextEncoder, caption: str | None) -> bool:
    """Return whether a file without this encoder's record holds its tensors for the same caption."""
    return encoder.keys <= header.keys and header.metadata.get("caption1", caption) == caption


def _named_tensors(conditions: Conditions, encoder: TextEncoder, stem: str) -> dict[str, Tensor]:
    """Return one prompt's outputs by their names in a file, on the CPU."""
    named = {}
    for key, value in conditions.items():
        tensor = (value[0] if isinstance(value, list) else value).detach().cpu()
        require_finite(tensor, stem, key)
        named[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
    return named


def _caption_file(source: MediaSource) -> FileIdentity | None:
    return None if source.caption_path is None else identify(source.caption_path)


def _batches(sources: Sequence[MediaSource], batch_size: int | None) -> list[Sequence[MediaSource]]:
    """Group consecutive sources of one table by `batch_size`, or by the table's batch size."""
    batches: list[list[MediaSource]] = []
    for source in sources:
        last = batches[-1] if batches else None
        if (
            last is None
            or last[0].table is not source.table
            or len(last) >= (batch_size or source.table.batch_size)
        ):
            batches.append([source])
        else:
            last.append(source)
    return [tuple(batch) for batch in batches]
