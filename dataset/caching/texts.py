"""Encode the captions without a valid text cache.

One file per caption serves all items of its source and holds the tensors of all encoders. Each text encoder
runs in a pass of its own, because two of them would not fit into memory. Until the last pass, outputs go to a
`.part` beside the file; the last pass joins everything, writes the file, and then removes the `.part`. So a
file is always complete, also if several processes work on it: whoever finds the `.part` gone finds the file.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
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
    identify,
    text_metadata,
    text_records,
)
from dataset.cache.store import CacheStore, Stores
from dataset.caching.given_tensors import read_embeds
from dataset.caching.latents import require_finite
from dataset.caching.planning import AT_ONCE, Caches
from dataset.caching.prefetch import WriteBehind, run_ahead
from dataset.caching.reports import NAMED
from dataset.caching.text_plans import (
    CaptionFile,
    EncodingPlan,
    KnownTexts,
    Wanted,
    find_finished,
    find_part,
    plan_text,
)
from dataset.sources.captions import describe_cut
from modules.bars import Bar
from modules.contract.data import Conditions
from modules.contract.family import TextEncoder
from modules.contract.requests import Prompt
from modules.errors import CacheError, CheckpointError
from modules.paths import path_exists

logger = logging.getLogger(__name__)

TextBatch = Sequence[CaptionFile]  # texts that are encoded together


@dataclass(frozen=True)
class TextCounts:
    """Results for some texts, in numbers of files."""

    written: int  # an encoder added something
    kept: int  # all others
    foreign: int  # with outputs that have no record


class TextEncoding:
    """The text encoders' passes. An encoder is freed when the next one is loaded, the last one by `free`."""

    def __init__(
        self,
        family: Caches,
        device: torch.device,
        workers: int,
        skip_existing: bool,
        show_progress: bool,
        stores: Stores,
        known: KnownTexts,
    ) -> None:
        self._stores = stores
        self._known = known
        self._family = family
        self._device = device
        self._workers = workers
        self._skip_existing = skip_existing
        self._show_progress = show_progress
        self._loaded: TextEncoder | None = None
        self._encoders = [(encoder, dict(encoder.identity)) for encoder in family.text_encoders()]

    def run(self, batches: Sequence[TextBatch]) -> TextCounts:
        """Encode missing outputs, one encoder after the other; an encoder without work is not loaded."""
        files = [file for batch in batches for file in batch]
        plans = self._plan(files)
        for encoder, identity in self._encoders:
            to_do = {plan.path: plan for plan in plans if encoder.name in plan.missing}
            logger.info("%s: %d captions, %d of them to encode", encoder.name, len(files), len(to_do))
            self._take_given(encoder, identity, files, to_do)
            if not to_do:
                continue
            self._load(encoder)
            texts = [file for file in files if file.path in to_do]
            warn_cut_captions(
                encoder, [(file.caption_path or file.name, file.caption or "") for file in texts]
            )
            with Bar(len(to_do), f"Encoding with {encoder.name}", "caption", self._show_progress) as bar:
                self._encode(encoder, identity, batches, to_do, bar)
        changed = sum(bool(plan.missing or plan.in_part) for plan in plans)
        return TextCounts(changed, len(files) - changed, sum(plan.is_foreign for plan in plans))

    def free(self) -> None:
        """Free the encoder that is loaded, if any."""
        if self._loaded is not None:
            self._loaded.free()
            self._loaded = None

    def _load(self, encoder: TextEncoder) -> None:
        if self._loaded is encoder:
            return
        self.free()
        self._loaded = encoder  # before it is loaded: what a failure leaves is freed too
        encoder.load(self._device)

    def _plan(self, files: Sequence[CaptionFile]) -> list[EncodingPlan]:
        """Compare all texts with their files; finish those that need nothing else. Returns the plans of those
        that were read.

        A `.part` is removed only if its file is complete. If it is no use it is replaced: another process may
        have written a better one since.
        """

        def compare(some: TextBatch) -> list[tuple[CaptionFile, EncodingPlan]]:
            encoders, skip_existing, known = self._encoders, self._skip_existing, self._known
            stores = self._stores
            plans = [
                (file, plan_text(stores.of(file.table), file, encoders, skip_existing, known))
                for file in some
            ]
            return [(file, plan) for file, plan in plans if not plan.is_known]

        jobs = [files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE)]
        plans = []
        for _, compared in run_ahead(jobs, compare, self._workers, lambda _: 0, limit_bytes=1):
            if isinstance(compared, Exception):
                raise compared
            for file, plan in compared:
                plans.append(plan)
                store = self._stores.of(file.table)
                if plan.missing:
                    continue
                if plan.in_part:  # an earlier run was stopped before it could do so
                    finish_text(store, Wanted(file, self._encoders, self._skip_existing))
                else:
                    store.remove(part_name(plan.path.name))
        return plans

    def _take_given(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        files: Sequence[CaptionFile],
        to_do: dict[Path, EncodingPlan],
    ) -> None:
        """Write the outputs that were computed before by this encoder, and take their texts off `to_do`."""
        taken, left = 0, []
        with WriteBehind() as writer:
            for file in files if to_do else ():
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
        is_file = file.caption_path is not None and path_exists(file.caption_path)  # else of class_tokens
        source = identify(file.caption_path) if file.caption_path is not None and is_file else None
        record = TextRecord(identity, file.caption or "", source, {}, file.settings)
        wanted = Wanted(file, self._encoders, self._skip_existing)
        writer.submit(partial(self._write, wanted, tensors, encoder.name, record, is_last))

    def _write(
        self, wanted: Wanted, tensors: Mapping[str, Tensor], encoder: str, record: TextRecord, is_last: bool
    ) -> None:
        store, architecture = self._stores.of(wanted.file.table), self._family.name
        written = write_text(store, wanted, tensors, encoder, record, architecture, is_last)
        if is_last:
            self._known.note_written(wanted, written)

    def _encode(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        batches: Sequence[TextBatch],
        to_do: Mapping[Path, EncodingPlan],
        bar: Bar,
    ) -> None:
        """Encode every incomplete batch, and write the missing outputs.

        Batches stay whole, because the last bits of an embedding depend on its neighbours: so a run that was
        killed and continued gives the same files as an uninterrupted one.
        """
        with WriteBehind() as writer, torch.no_grad():
            for batch in batches:
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


def warn_cut_captions(encoder: TextEncoder, captions: Sequence[tuple[Path | str, str]]) -> None:
    """Warn about captions with more tokens than the encoder reads: their ends are not used.

    captions: each with its place, for the message.
    """
    try:
        count_tokens = encoder.token_counter()
    except CheckpointError as error:
        logger.info("tokens of the captions are not counted: %s", error)
        return
    number = 0
    lines: list[str] = []
    for place, caption in captions:
        count = count_tokens(caption)
        number += count.is_cut
        if count.is_cut and len(lines) < NAMED:
            lines.append(describe_cut(place, encoder.name, count))
    if number:
        logger.warning(
            "%d of %d captions are longer than %s reads; the rest of them is not used. The first:\n  %s",
            number,
            len(captions),
            encoder.name,
            "\n  ".join(lines),
        )


def write_text(
    store: CacheStore,
    wanted: Wanted,
    tensors: Mapping[str, Tensor],
    encoder: str,
    record: TextRecord,
    architecture: str,
    is_last: bool = True,
) -> Header:
    """Write one encoder's tensors (by their names in the file) to a text cache: to its `.part` or the file.

    is_last: no other encoder adds anything, so the tensors are joined with the content of the `.part` and the
    file. Tensors with other names, other metadata and other encoders' records are kept. A changed caption is
    replaced with a warning. Returns the header of the written file. Raises OutputError if writing fails,
    CacheError if the output of other encoders is gone: no file is left incomplete.
    """
    sums = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    metadata = {"architecture": architecture, "caption1": record.caption, "format_version": FORMAT_VERSION}
    metadata |= text_metadata({encoder: dataclasses.replace(record, crc32=sums)})
    path = store.folder / wanted.name
    new = Entry(Header(path, metadata, tuple(tensors)), tensors)
    part = find_part(store, wanted)  # before the file, as another process may finish it now
    if part.entry is not None:
        new = _join(part.entry, new)
    if not is_last:
        store.write(part_name(wanted.name), new.named, new.header.metadata)
        return new.header
    old = find_finished(store, wanted)
    if old.entry is not None:
        before = old.entry.header.metadata.get("caption1", record.caption)
        if before != record.caption:
            logger.warning(
                "%s: the caption was %r, now it is %r; it is replaced", path, before, record.caption
            )
        new = _join(old.entry, new)
    _finish(store, wanted, new, {encoder, *part.right, *old.right})
    return new.header


def finish_text(store: CacheStore, wanted: Wanted) -> None:
    """Write a text cache whose tensors are all in the file and its `.part`.

    Raises OutputError if writing fails, CacheError if the `.part` is gone and the file is incomplete.
    """
    part, old = find_part(store, wanted), find_finished(store, wanted)
    new = part.entry or old.entry
    if part.entry is not None and old.entry is not None:
        new = _join(old.entry, part.entry)
    if new is not None:
        _finish(store, wanted, new, {*part.right, *old.right})


def _finish(store: CacheStore, wanted: Wanted, entry: Entry, there: Collection[str]) -> None:
    """Write a complete file, then remove its `.part`. there: the encoders whose valid outputs `entry` has."""
    lost = [encoder.name for encoder, _ in wanted.encoders if encoder.name not in there]
    if lost:
        raise CacheError(
            f"{store.folder / wanted.name}: while it was made, another run with other captions or encoders "
            f"removed or replaced what {', '.join(lost)} had written.\n"
            "  Let one of the two end, then run this command again."
        )
    store.replace(part_name(wanted.name), wanted.name, entry.named, entry.header.metadata)


def _join(old: Entry, new: Entry) -> Entry:
    """Join two entries; the new one wins if both have something."""
    new_keys = new.header.keys
    kept = {name: tensor for name, tensor in old.named.items() if tensor_key(name) not in new_keys}
    named = {**kept, **new.named}
    records = text_metadata({**text_records(old.header), **text_records(new.header)})
    metadata = {**old.header.metadata, **new.header.metadata, **records}
    return Entry(Header(new.header.path, metadata, tuple(named)), named)


def _named_tensors(conditions: Conditions, encoder: TextEncoder, stem: str) -> dict[str, Tensor]:
    """Return one prompt's outputs by their names in a file, on the CPU."""
    named = {}
    for key, value in conditions.items():
        tensor = (value[0] if isinstance(value, list) else value).detach().cpu()
        require_finite(tensor, stem, key)
        named[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
    return named


def text_batches(files: Sequence[CaptionFile], batch_size: int | None) -> list[TextBatch]:
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
