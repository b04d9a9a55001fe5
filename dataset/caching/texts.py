"""Encode the captions without a valid text cache.

One file per caption serves all items of its source and holds the tensors of all encoders. Each text encoder
runs in a pass of its own, because two of them would not fit into memory. Until the last pass, outputs go to a
`.part` beside the file; the last pass joins everything and gives it the file's name. So a file is always
complete.
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
    part_name,
    tensor_key,
    tensor_name,
)
from dataset.cache.records import (
    TextRecord,
    difference,
    identify,
    text_metadata,
    text_records,
    verify_tensors,
)
from dataset.cache.store import CacheStore, Stores
from dataset.caching.caption_files import CaptionFile
from dataset.caching.given_tensors import read_embeds
from dataset.caching.latents import require_finite
from dataset.caching.planning import Caches
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


def plan_text(store: CacheStore, file: CaptionFile, encoders: Encoders, skip_existing: bool) -> TextPlan:
    """Compare a text's file, finished or not, with what the encoders would write. Nothing is changed."""
    path = file.path
    right, _ = _right(store, path.name, file, encoders, skip_existing)
    part, others = _right(store, part_name(path.name), file, encoders, skip_existing=False)
    if others:
        # it is from a run with other encoders or another caption: joining it would corrupt the valid outputs
        part = {}
    names = [encoder.name for encoder, _ in encoders]
    return TextPlan(
        path,
        missing=tuple(name for name in names if name not in right and name not in part),
        in_part=tuple(name for name in names if name not in right and name in part),
        is_foreign=not all(right.values()),
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
        skip_existing: bool,
        show_progress: bool,
        stores: Stores,
    ) -> None:
        self._stores = stores
        self.written = self.kept = self.foreign = 0
        self._family = family
        self._device = device
        self._batch_size = batch_size
        self._workers = workers
        self._skip_existing = skip_existing
        self._show_progress = show_progress

    def run(self, files: Sequence[CaptionFile]) -> None:
        """Encode what is missing, one encoder after the other; an encoder without work is not loaded."""
        encoders = [(encoder, dict(encoder.identity)) for encoder in self._family.text_encoders()]
        plans = self._plan(files, encoders)
        for encoder, identity in encoders:
            to_do = {plan.path: plan for plan in plans if encoder.name in plan.missing}
            logger.info("%s: %d captions, %d of them to encode", encoder.name, len(files), len(to_do))
            self._take_given(encoder, identity, files, to_do)
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
        """Compare all texts with their files. Finish or remove unfinished files that need nothing else."""

        def compare(file: CaptionFile) -> TextPlan:
            return plan_text(self._stores.of(file.table), file, encoders, self._skip_existing)

        plans = []
        for file, plan in run_ahead(files, compare, self._workers, lambda _: 0, limit_bytes=1):
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
                self._stores.of(file.table).remove(part_name(plan.path.name))
            elif not plan.missing:
                finish_text(
                    self._stores.of(file.table), plan.path.name
                )  # an earlier run was stopped before it could do so
        return plans

    def _take_given(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        files: Sequence[CaptionFile],
        to_do: dict[Path, TextPlan],
    ) -> None:
        """Write the outputs that were computed before by this encoder, and take their texts off `to_do`."""
        taken, left = 0, []
        with WriteBehind() as writer:
            for file in files:
                if file.path not in to_do:
                    continue
                conditions, why = read_embeds(file, encoder, identity)
                if conditions is not None:
                    is_last = to_do.pop(file.path).is_last(encoder.name)
                    self._submit(writer, file, encoder, identity, conditions, is_last)
                    taken += 1
                elif why is not None:
                    left.append(f"{file.embeds}: {why}")
        if taken or left:
            logger.info("%s: %d captions have embeddings already", encoder.name, taken)
        if left:
            logger.warning(
                "%d captions are encoded here, because their embeddings cannot be used by %s. The first: %s",
                len(left),
                encoder.name,
                left[0],
            )

    def _submit(
        self,
        writer: WriteBehind,
        file: CaptionFile,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        conditions: Conditions,
        is_last: bool,
    ) -> None:
        tensors = _named_tensors(conditions, encoder, file.name)
        source = None if file.caption_path is None else identify(file.caption_path)
        record = TextRecord(identity, file.caption or "", source, {}, file.settings)
        store, name = self._stores.of(file.table), file.path.name
        writer.submit(
            partial(write_text, store, name, tensors, encoder.name, record, self._family.name, is_last)
        )

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
                    is_last = to_do[file.path].is_last(encoder.name)
                    self._submit(writer, file, encoder, identity, conditions, is_last)
                bar.update(len(missing))


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
) -> None:
    """Write one encoder's tensors (by their names in the file) to a text cache: to its `.part` or the file.

    is_last: no other encoder adds anything, so the tensors are joined with the content of the `.part` and the
    file. Tensors with other names, other metadata and other encoders' records are kept. A changed caption is
    replaced with a warning. Raises OutputError if writing fails.
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
        return
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


def _right(
    store: CacheStore, name: str, file: CaptionFile, encoders: Encoders, skip_existing: bool
) -> tuple[dict[str, bool], frozenset[str]]:
    """Return the encoders whose outputs in a file are valid (name -> has a record), and all other records.

    Valid outputs are those that the encoder would write. skip_existing: outputs without a record are valid if
    the caption is the same.
    """
    right: dict[str, bool] = {}
    if not store.has(name):
        return right, frozenset()
    try:
        entry = store.read(name)
        records = text_records(entry.header)
    except CacheError as error:
        logger.warning("%s. It is made again.", error)
        return right, frozenset()
    for encoder, identity in encoders:
        record = records.get(encoder.name)
        if record is None:
            if skip_existing and not file.settings and _is_foreign(entry.header, encoder, file.caption):
                right[encoder.name] = False
            continue
        changed = difference(record.encoder, identity) or difference(
            {"caption": record.caption, **record.settings}, {"caption": file.caption, **file.settings}
        )
        if changed is not None:
            logger.debug("%s: %s", store.folder / name, changed)
            continue
        try:
            verify_tensors(entry, record.crc32)
            right[encoder.name] = True
        except CacheError as error:
            logger.warning("%s. It is made again.", error)
    return right, frozenset(records.keys() - right.keys())


def _require_existing(store: CacheStore, name: str) -> Entry | None:
    try:
        entry = store.read(name) if store.has(name) else None
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
