"""Encode the captions that have no valid text cache.

A caption has one file for all items of its source, with the tensors of all encoders. Each text encoder runs
in a separate pass, because two of them would not fit into memory. Until the last pass, outputs are in a
`.part` next to the file; the last pass merges all outputs, writes the file, and then removes the `.part`. A
file is therefore always complete, even if several processes work on it.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache.records import TextRecord, identify, record_metadata, require_finite, text_records
from dataset.cache.store import Stores, npz_names, remove_caches
from dataset.cache_files import (
    FORMAT_VERSION,
    PART,
    Entry,
    checksum,
    is_text_cache,
    is_text_name,
    parse_more_text_name,
    tensor_key,
    tensor_name,
)
from dataset.caching.precomputed import submit_embeds
from dataset.caching.prefetch import (
    CacheReport,
    Failure,
    Write,
    count_workers,
    list_sources,
    write_behind,
)
from dataset.caching.text_plans import (
    CaptionFile,
    distinct_texts,
    find_outputs,
    find_visible_media,
    list_caption_files,
    plan_texts,
)
from dataset.config import DatasetConfig, DatasetTable
from dataset.listing import require_captions
from dataset.options import CachingOptions
from dataset.sources.decoding import DecodedMedia, decode_source
from dataset.sources.media_source import MediaSource
from dataset.sources.references import explain_reference, hold_references
from dataset.sources.remarks import NAMED, find_caption_warnings, log_warnings, warn_cut_captions
from dataset.subsets import reject_changing
from modules.bars import Bar
from modules.console import format_count, show_box
from modules.errors import CacheError, CaptionError, MediaError
from modules.media.colors import AS_SHOWN
from modules.paths import path_exists
from protocols.data import Conditions
from protocols.family import Caches, TextEncoder, has_cache_metadata
from protocols.requests import Prompt

logger = logging.getLogger(__name__)

TextBatch = Sequence[CaptionFile]  # texts that are encoded together


class TextWork:
    """Encodes and caches the captions of a dataset in batches (`work_items`).

    Each encoder is freed when the next one is loaded, and the last one by `free`.
    """

    def __init__(
        self,
        family: Caches,
        config: DatasetConfig,
        options: CachingOptions,
        device: torch.device,
        stores: Stores | None = None,
    ) -> None:
        """List existing cache files and all captions.

        `stores` replaces the cache folders of the tables.

        Raises:
            DatasetError: If the dataset cannot be used or a caption is missing.
            CheckpointError: If an encoder's file cannot be used.
        """
        self._family, self._config, self._device = family, config, device
        self._workers = count_workers(options)
        self.stores = stores = dataclasses.replace(
            stores or Stores(npz_names(family)), skip_existing=options.skip_existing, verify=options.verify
        )
        # names of each table's text cache files, also unfinished ones (`.part`)
        self._existing: dict[int, list[str]] = {}
        self._parts: set[str] = set()  # unfinished files of all tables
        for table in config.datasets:
            names = stores.text_store(table).names()
            existing = [name for name in names if is_text_name(name.removesuffix(PART), family.cache_tag)]
            self._existing[table.index] = existing
            self._parts |= {name for name in existing if name.endswith(PART)}
        # captions that change at random cannot be cached
        for table in config.datasets:
            if table.group is not None:
                reject_changing(table, table.captions.changes.varying_keys, "texts")
        listing = list_sources(config, captions=True)
        self._sources = listing.sources
        self.listing_report = listing.report  # failures of listing
        self.complete_tables = listing.complete_tables
        if any(source.caption is None for source in self._sources):
            require_captions(self._sources)
        log_warnings(find_caption_warnings(self._sources), NAMED)
        family.check_named_files()
        stores.require_declared_formats(config.datasets, family.cache_tag)
        encoders = list(family.text_encoders())
        self._visible_media = find_visible_media(encoders)
        files = list_caption_files(self._sources, family.cache_tag, self._visible_media, family)
        self._files = distinct_texts(files, stores)
        self.work_items: Sequence[TextBatch] = _make_batches(self._files, options.batch_size)
        self._encoders = [(encoder, dict(encoder.identity)) for encoder in encoders]
        self._loaded_encoder: TextEncoder | None = None
        # texts that cannot be encoded, or whose reference images are unusable
        self._failures_by_file: dict[CaptionFile, Failure] = {}

    def encode(self, batches: Sequence[TextBatch], label: str | None) -> CacheReport:
        """Encode the captions in these batches that have no valid cache, one encoder after the other.

        An encoder is not loaded if all its outputs are cached. If `label` is None, no progress is shown.

        Raises:
            CheckpointError: If an encoder cannot be loaded.
            OutputError: If a cache file cannot be written.
        """
        if label is not None:
            captions = format_count(len(self._files), "caption")
            data = f"{self._config.path}, {captions}"
            show_box("Caching texts", [("data", data), ("device", str(self._device))])
        all_files = [file for batch in batches for file in batch]
        # the same files in the same order, each with the encoders that have to run for it
        files = plan_texts(all_files, self._encoders, self.stores, self._workers)
        remaining = iter(files)
        planned_batches = [tuple(itertools.islice(remaining, len(batch))) for batch in batches]
        self._failures_by_file.clear()
        for file in files:
            if not file.encoders_to_run:  # nothing to encode, but an earlier run may have left a `.part`
                # If some outputs are only in the unfinished `.part` file, the complete file is written from
                # it. An unneeded `.part` file is removed.
                part = file.file_name + PART
                if file.has_partial_outputs:  # an earlier run was stopped before it wrote the file
                    unfinished, encoders = find_outputs(file, self._encoders, self.stores, in_part=True)
                    self._write_complete(file, unfinished, encoders)
                elif part in self._parts and not self.stores.trusts_shared_caches:
                    self.stores.text_store(file.table).remove(part)
        for encoder, identity in self._encoders:
            to_do = [file for file in files if encoder.name in file.encoders_to_run]
            to_do = [file for file in to_do if file not in self._failures_by_file]
            logger.info("%s: %d captions, %d of them to encode", encoder.name, len(files), len(to_do))
            if to_do:
                self._run_encoder(
                    encoder, identity, batches=planned_batches, to_do=to_do, shows=label is not None
                )
        return self._make_report(files)

    def _make_report(self, files: Sequence[CaptionFile]) -> CacheReport:
        """Return the report about these captions after all encoders have run."""
        num_failed = len(self._failures_by_file)
        # a text was planned if an encoder had to run, or if its outputs were only in a `.part`
        num_planned = sum(bool(file.encoders_to_run or file.has_partial_outputs) for file in files)
        num_written = num_planned - num_failed
        valid = [file for file in files if file not in self._failures_by_file]
        failures = dict.fromkeys(self._failures_by_file.values())  # captions of one file share a failure
        return CacheReport(
            written=num_written,
            reused=len(files) - num_written - num_failed,
            num_without_record=sum(file.lacks_record for file in files),
            failures=tuple(failures),
            num_assigned=len(files),
            num_total=len(self._files),
            valid=frozenset((file.table.index, file.file_name) for file in valid),
        )

    def remove_stale(
        self, table: DatasetTable, valid: object, failed: Collection[str], keep_cache: bool
    ) -> int:
        """Remove a table's text cache files that belong to no caption; return their number.

        `valid` and `failed` are not used, because captions alone determine the names. With `keep_cache`,
        only files of further captions are removed, if a media file now has fewer captions.
        """
        names = {file.file_name for file in self._files if file.table.index == table.index}
        # `.part` entries, too
        stale = [name for name in self._existing[table.index] if name.removesuffix(PART) not in names]
        stale.sort()
        if keep_cache:
            stale = self._further_captions(table, stale)
        store = self.stores.text_store(table)
        is_family_cache = partial(is_text_cache, architecture=self._family.name)
        return remove_caches(store, stale, is_family_cache) if stale else 0

    def _further_captions(self, table: DatasetTable, names: Sequence[str]) -> list[str]:
        """Return the names of text cache files that belong to second or further captions of current media."""
        stems = {source.stem for source in self._sources if source.table.index == table.index}
        further = []
        for name in names:
            parsed = parse_more_text_name(name.removesuffix(PART), self._family.cache_tag)
            if parsed is not None:
                stem, _ = parsed
                if stem in stems:
                    further.append(name)
        return further

    def free(self) -> None:
        """Free the memory of the loaded text encoder, if any."""
        if self._loaded_encoder is not None:
            self._loaded_encoder.free()
            self._loaded_encoder = None

    def _run_encoder(
        self,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        batches: Sequence[TextBatch],
        to_do: list[CaptionFile],
        shows: bool,
    ) -> None:
        """Encode every batch in which a caption lacks outputs, and write the missing outputs."""
        # All captions of the batch are encoded, because the last bits of an embedding depend on the others. A
        # resumed run therefore writes the same files as an uninterrupted run.
        with write_behind() as write:
            submit = partial(self._schedule_write, write, encoder, identity)
            if any(file.embeds is not None for file in to_do):
                # imported here, because few tables have precomputed embeddings

                to_do = submit_embeds(to_do, encoder, identity, submit)
                if not to_do:
                    return
            if self._loaded_encoder is not encoder:
                self.free()
                # set before loading, so that `free` also works after a failure
                self._loaded_encoder = encoder
                encoder.load(self._device)
            captions = [(file.caption_path or file.name, file.caption or "") for file in to_do]
            warn_cut_captions(encoder, captions)
            incomplete = {*to_do}
            bar = Bar(len(to_do), f"Encoding with {encoder.name}", "caption", shows, shows_immediately=True)
            with bar, torch.no_grad():
                for batch in batches:
                    if incomplete.isdisjoint(batch):
                        continue
                    for file, conditions in self._encode_batch(encoder, batch):
                        if file in incomplete:  # the outputs of all others are cached already
                            submit(file, conditions)
                    bar.update(len(incomplete.intersection(batch)))

    def _encode_batch(self, encoder: TextEncoder, batch: TextBatch) -> list[tuple[CaptionFile, Conditions]]:
        """Run an encoder on a batch of captions; return each caption with its outputs."""
        # If a reference image or a caption cannot be used, the captions are encoded one by one, and only the
        # invalid one becomes a failure.
        try:
            with contextlib.ExitStack() as stack:  # keeps reference images while the encoder reads them
                prompts = []
                for file in batch:
                    prompt = Prompt(file.caption or "", images=())
                    if file.source is not None:  # the encoder sees media with the caption
                        prompt = self._add_seen_media(prompt, file.source, stack)
                    prompts.append(prompt)
                encoded = encoder.encode(prompts)
            return list(zip(batch, encoded, strict=True))
        except (MediaError, CaptionError) as error:
            if len(batch) > 1:  # the error does not say which of the texts is unusable
                one_by_one = [self._encode_batch(encoder, [file]) for file in batch]
                return [*itertools.chain.from_iterable(one_by_one)]
            (file,) = batch
            failure = _describe_failure(file, error)
            if failure is None:  # not an error of the dataset
                raise
            self._failures_by_file[file] = failure
            return []

    def _add_seen_media(self, prompt: Prompt, source: MediaSource, stack: contextlib.ExitStack) -> Prompt:
        """Return the prompt with the media of an item that text encoders see."""
        # `stack` keeps downloaded or unpacked reference images until the caller closes it.
        if source.table.references.rules is not None:
            references = stack.enter_context(hold_references(source))
            prompt = dataclasses.replace(prompt, images=references)
        rules = self._family.references
        if rules is not None and rules.text_sees_vae_input:
            # reference images at the size that the VAE encodes, each H W C
            media = self._decode(source)
            prompt = dataclasses.replace(
                prompt, image_pixels=tuple(torch.from_numpy(frames[0]) for frames in media.control)
            )
        if self._visible_media.frames:
            decoded = self._decode(source)
            if len(decoded.spans) != 1:
                problem = f"{len(decoded.spans)} items are cut out of it" if decoded.spans else decoded.reason
                raise MediaError(
                    f"{source.path}: {problem}, but the text encoder needs the frames of exactly one. Set "
                    'frame_extraction = "head" and one length in target_frames in the table, or cut the file.'
                )
            (span,) = decoded.spans
            item = decoded.cut(span)
            first_frames = [control[0] for control in item.control]  # each H W C
            control_images = tuple(torch.from_numpy(frame) for frame in first_frames)
            prompt = dataclasses.replace(
                prompt,
                clip=torch.from_numpy(item.frames),
                # set already if encoders see references as the VAE does
                image_pixels=prompt.image_pixels or control_images,
                media=source.row_references if self._visible_media.reference_media else (),
                text_with_references=source.further_text,
            )
        return prompt

    def _decode(self, source: MediaSource) -> DecodedMedia:
        """Decode the frames of an item as the VAE encodes them."""
        latent = self._family.latent
        return decode_source(
            source,
            self._family.defaults.fps,
            latent.pixel_step,
            latent.lengths,
            keeps_alpha=latent.keeps_alpha,
            has_alpha=latent.has_alpha,
        )

    def _schedule_write(
        self,
        write: Write,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        file: CaptionFile,
        conditions: Conditions,
    ) -> None:
        """Bring an encoder's outputs for a caption into main memory, and write them in the background."""
        tensors = {}  # by name in the file
        for key, output in conditions.items():
            tensor = (output[0] if isinstance(output, list) else output).detach().cpu()
            require_finite(tensor, file.name, key)
            tensors[tensor_name(key, tensor, variable=key in encoder.variable_length)] = tensor
        write(partial(self._write, file, encoder, identity, tensors))

    def _write(
        self,
        file: CaptionFile,
        encoder: TextEncoder,
        identity: Mapping[str, str],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Add an encoder's outputs and their record to the `.part` file, or write the complete file."""
        # Tensors, metadata and records of other encoders are kept.
        caption = file.caption or ""
        caption_file = None
        # without a caption file, the caption is the class_tokens of the table
        if file.caption_path is not None and path_exists(file.caption_path):
            caption_file = identify(file.caption_path)
        references = tuple(identify(path, origin) for path, origin in file.references)
        record = TextRecord(
            encoder=identity,
            caption=caption,
            file=caption_file,
            crc32={name: checksum(name, tensor) for name, tensor in tensors.items()},
            settings=file.settings,
            references=references,
            # 0: no image was decoded, so later versions cannot decode it differently
            decoding_version=AS_SHOWN if references else 0,
        )
        metadata = {"architecture": self._family.name, "caption1": caption, "format_version": FORMAT_VERSION}
        if has_cache_metadata(encoder):
            metadata |= encoder.cache_metadata(caption, [image.sha256 for image in references])
        metadata |= record_metadata({encoder.name: record})
        store = self.stores.text_store(file.table)
        entry = Entry.of(store.folder / file.file_name, metadata, tensors)
        # outputs of the encoders before this one. The unfinished file is read before the finished one (in
        # `_write_complete`), because another process may finish it in between
        unfinished_entry, earlier_encoders = find_outputs(file, self._encoders, self.stores, in_part=True)
        if unfinished_entry is not None:
            entry = _merge_entries(unfinished_entry, entry)
        if encoder.name == file.encoders_to_run[-1]:  # the last encoder that adds outputs
            self._write_complete(file, entry, {encoder.name, *earlier_encoders})
        else:
            store.write(file.file_name + PART, entry.named, entry.metadata)

    def _write_complete(self, file: CaptionFile, new: Entry | None, encoders: Collection[str]) -> None:
        """Merge new outputs into the existing text cache, if any; write the file, then remove its `.part`."""
        # `encoders` are the names of encoders with valid outputs in `new`. A changed caption is replaced with
        # a warning.
        store = self.stores.text_store(file.table)
        path = store.folder / file.file_name
        existing, encoders_in_file = find_outputs(file, self._encoders, self.stores)
        if existing is not None:
            caption = file.caption or ""
            old_caption = existing.metadata.get("caption1", caption)
            if old_caption != caption:
                logger.warning(
                    "%s: the caption was %r, but now is %r; the cache is replaced", path, old_caption, caption
                )
            new = existing if new is None else _merge_entries(existing, new)
        if new is None:  # another process has just finished the text and removed its `.part`
            return
        encoders_with_outputs = {*encoders, *encoders_in_file}
        all_encoders = [encoder.name for encoder, _ in self._encoders]
        lost_encoders = [name for name in all_encoders if name not in encoders_with_outputs]
        if lost_encoders:
            raise CacheError(
                f"{path}: while it was made, another run with other captions or encoders removed or replaced "
                f"what {', '.join(lost_encoders)} had written.\n"
                "  Wait until one of the two has finished, then run this command again."
            )
        store.write(file.file_name, new.named, new.metadata)
        store.remove(file.file_name + PART)  # last: another process may need it until then


def _describe_failure(file: CaptionFile, error: MediaError | CaptionError) -> Failure | None:
    """Return the report about a caption that cannot be encoded; None if no dataset file causes this."""
    if isinstance(error, CaptionError):
        path = file.caption_path or Path(file.name)
        return Failure(path, str(error), file.table.index, file.name)
    if file.source is None:
        return None
    if file.source.table.references.rules is not None:
        return Failure.of(file.source, explain_reference(file.source, error))
    return Failure.of(file.source, error)


def _make_batches(files: Sequence[CaptionFile], size: int | None) -> list[TextBatch]:
    """Group consecutive captions of one table and one kind (first, further, empty) into batches."""
    # `size` is the batch size; None means the batch_size of the table.
    batches: list[TextBatch] = []
    for _, group in itertools.groupby(files, lambda file: (file.table.index, file.encoding_round)):
        texts = tuple(group)
        batch_size = size or texts[0].table.learning.batch_size
        batches += [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return batches


def _merge_entries(old: Entry, new: Entry) -> Entry:
    """Merge two caches of a caption, each with the outputs of some encoders; `new` takes precedence."""
    # If an encoder has outputs in both, all its old tensors are dropped, even if `new` has no tensor of that
    # name.
    old_records = text_records(old)
    new_records = text_records(new)
    replaced_keys = set(new.keys)
    for encoder in old_records.keys() & new_records.keys():
        replaced_keys |= {tensor_key(name) for name in old_records[encoder].crc32}
    tensors = {name: tensor for name, tensor in old.named.items() if tensor_key(name) not in replaced_keys}
    tensors |= new.named
    records = record_metadata({**old_records, **new_records})
    return Entry.of(new.path, {**old.metadata, **new.metadata, **records}, tensors)
