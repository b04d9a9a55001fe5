"""Read, verify and stack cached items when they are needed."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from dataset.batches.checks import audio_errors, latent_errors, text_errors
from dataset.batches.given_parts import add_clean_conditions
from dataset.batches.items import NO_COMMANDS, CachingCommands, TrainingItem
from dataset.cache.records import (
    CHECK_KEY,
    CLOCK,
    CacheChecks,
    LatentRecord,
    latent_record,
    text_records,
    verify_tensors,
)
from dataset.cache.store import NewCaption, Stores
from dataset.cache_files import EMPTY, FLIPPED, CacheStore, Entry, NpzNames, parse_latent_name, read_entry
from dataset.sources.frames import spans
from modules.errors import CacheError
from modules.media.buckets import inner_box
from modules.media.colors import AS_SHOWN
from modules.media.lengths import ClipLengths
from modules.option_values import format_shape
from protocols import data


def read_batch(
    items: Sequence[TrainingItem],
    latent: data.LatentSpec,
    commands: CachingCommands = NO_COMMANDS,
    checks: CacheChecks | None = None,
    captions: Sequence[int] | None = None,
    stores: Stores | None = None,
    flips: Sequence[bool] = (),
    undropped: Sequence[int] = (),
    encoded: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
    reads_empty: bool = False,
    reads_rejected: bool = False,
) -> data.Batch:
    """Read, check and stack the cache files of a batch; `latents` are B C F H W.

    Tensors of variable length are kept as lists. For captions without a cache, the batch has only `captions`,
    unchanged.

    Args:
        items: Items of the batch, all with the same shapes.
        latent: The family's latent space.
        commands: Commands that repair caches, for messages.
        checks: Checks of this run, by which each file is checked once. None for new ones.
        captions: Index of each item's caption, or EMPTY for the empty prompt; None for the first captions.
        stores: Stores of the run, which keep shards open.
        flips: Which items are mirrored; () for none.
        undropped: For a teacher model, the indices of the captions before dropout; all must be cached. The
            batch also contains these text embeddings if they differ from `captions`.
        encoded: Tensors of items that were encoded during training, without batch dimension, by position in
            the batch.
        reads_empty: Whether to read the empty prompt, too (`DatasetTable.uses_empty_prompt`).
        reads_rejected: Whether to read the latents of rejected clips, too; all items must have them.

    Raises:
        CacheError: If a file is damaged or outdated (other options, changed media or caption), or has a
            wrong shape. The message names the file and the command that repairs it.
    """
    reader = _Reader(
        stores=stores or stores_for(items[0], latent),
        latent=latent,
        commands=commands,
        checks=checks or CacheChecks(),
        encoded=encoded,
        reads_rejected=reads_rejected,
    )
    caption_indices = captions or [0] * len(items)
    are_mirrored = flips or [False] * len(items)
    media = [
        reader.read_media(item, position, is_mirrored)
        for position, (item, is_mirrored) in enumerate(zip(items, are_mirrored, strict=True))
    ]
    texts = reader.read_texts(items, caption_indices)
    if reads_rejected:
        # preference training needs latents of the rejected clip of each item
        for item in media:
            if data.REJECTED_LATENTS not in item.tensors:
                raise CacheError(explain_no_rejected(item.path, commands))
    tensors = _join_media_and_texts(media, texts, latent, commands)
    has_dropped_captions = bool(undropped) and tuple(undropped) != tuple(caption_indices)
    undropped_texts = reader.read_texts(items, undropped) if has_dropped_captions else []
    empty_texts = reader.read_texts(items, [EMPTY] * len(items)) if reads_empty else []
    # media and text of each item, then further texts: messages list caches in this order
    media_and_texts = itertools.chain.from_iterable(zip(media, texts, strict=True))
    read_caches = (*media_and_texts, *undropped_texts, *empty_texts)
    batch = replace(
        _make_batch(items, texts, tensors),
        cache_origins=tuple(itertools.chain.from_iterable(cache.origins for cache in read_caches)),
        undropped=_stack(undropped_texts, commands, is_text=True),
        empty_text=_stack(empty_texts, commands, is_text=True),
    )
    if any(item.table.references.has_conditioned_parts for item in items):
        batch = add_clean_conditions(batch, items)
    return batch


def _make_batch(
    items: Sequence[TrainingItem], texts: Sequence["_ItemTensors"], tensors: Mapping[str, Any]
) -> data.Batch:
    """Return a batch of these tensors, with the facts that each item's text and table add to it."""
    # Facts that are the default for all items are left empty. Rejected latents become a field of their own.
    are_empty = tuple(text.is_empty for text in texts)
    weights = tuple(item.table.learning.prior_loss_weight for item in items)
    attributes = tuple(item.table.learning.attributes for item in items)
    return data.Batch(
        tensors={name: tensor for name, tensor in tensors.items() if name != data.REJECTED_LATENTS},
        captions=tuple(text.caption for text in texts),
        keys=tuple(item.key for item in items),
        loss_weights=() if set(weights) == {1.0} else weights,
        attributes=attributes if any(attributes) else (),
        network_multiplier=items[0].table.learning.network_multiplier,
        rejected=tensors.get(data.REJECTED_LATENTS),
        has_empty_text=are_empty if any(are_empty) else (),
        text_metadata=tuple(text.metadata for text in texts),
    )


def _read_new_caption(item: TrainingItem, new_caption: NewCaption) -> "_ItemTensors":
    """Read a caption that replaces those of an item, from its own file if it is not encoded in each step."""
    text = new_caption.text
    if new_caption.path is None:
        return _ItemTensors(item.caption_path(0), {}, caption=text, is_empty=not text)
    entry = read_entry(str(new_caption.path))
    records = text_records(entry)
    for record in records.values():
        verify_tensors(entry, record.crc32)
    return _ItemTensors(
        new_caption.path,
        entry.tensors,
        variable_length=entry.variable,
        caption=text,
        is_empty=not text,
        origins=tuple(
            data.CacheOrigin(new_caption.path, name, record.encoder) for name, record in records.items()
        ),
        metadata=entry.metadata,
    )


def explain_no_rejected(path: Path, commands: CachingCommands) -> str:
    """Return the error message for a cache without rejected latents, which --preference needs."""
    return (
        f"{path}: it has no latents of a worse one, which --preference needs. Set "
        f"worse_directory in the table, or worse_path in a list, and cache again with:\n  {commands.latents}"
    )


def _join_media_and_texts(
    media: Sequence["_ItemTensors"],
    texts: Sequence["_ItemTensors"],
    latent: data.LatentSpec,
    commands: CachingCommands,
) -> dict[str, Any]:
    """Stack the tensors of a batch's media and texts; return them by key."""
    # items without audio or masks get placeholders, so that tensors can be stacked
    has_audio = [data.AUDIO_LATENTS in item.tensors for item in media]  # before silent items get zeros
    if len(media) > 1:
        # tensors that only some items have are added to the others: silent audio (not learned), white masks
        fillings = {data.AUDIO_LATENTS: 0, data.CONTROL_MASK: 255}  # white: the whole clip is generated
        for name, filling in fillings.items():
            template = next((item.tensors[name] for item in media if name in item.tensors), None)
            if template is not None:
                for item in media:
                    item.tensors.setdefault(name, torch.full_like(template, filling))
        if any(data.LOSS_MASK in item.tensors for item in media):  # its size depends on the item's latents
            for item in media:
                ones = torch.ones(item.tensors["latents"].shape[1:], dtype=torch.float16)
                item.tensors.setdefault(data.LOSS_MASK, ones)
    tensors = {**_stack(media, commands, is_text=False), **_stack(texts, commands, is_text=True)}
    if latent.references_first:  # the model gets references as the first frames of the clip
        _prepend_references(tensors)
    if any(has_audio):
        tensors[data.HAS_AUDIO] = torch.tensor(has_audio)
    if latent.caches_audio and media:
        # audio that latent caches contain gets the layout of separate audio caches
        audio = tensors.pop(data.INNER_AUDIO, None)  # B C T M, or B C 1 T M
        is_heard = tensors.pop(data.AUDIO_PRESENT, None)  # for each sample: 1, or 0 for a silent clip
        if not isinstance(audio, Tensor) or not isinstance(is_heard, Tensor):
            missing_key = data.INNER_AUDIO if audio is None else data.AUDIO_PRESENT
            raise CacheError(
                f"{media[0].path}: it has no {missing_key}, which the model needs for every clip, even a "
                f"silent one. Cache again with: {commands.latents}"
            )
        tensors[data.AUDIO_LATENTS] = audio.squeeze(2) if audio.ndim > 4 else audio  # B C T M
        tensors[data.HAS_AUDIO] = is_heard.flatten() != 0
    rates = tensors.get(data.FPS)
    if isinstance(rates, Tensor):
        # thousandths of a frame per second: integers keep their values when a batch is cast to bfloat16
        tensors[data.FPS] = (1000 * rates.double()).round().long()
    return tensors


def _count_windows(item: TrainingItem, record: LatentRecord, lengths: ClipLengths) -> int:
    """Return how many spans of a clip are training items, from the record of its latents; 0 if unknown."""
    table, clip = item.table, record.clip
    if table.source.has_precomputed_latents or clip is None or record.parts > 1:
        return 0
    # reading may have stopped early; only windows at the head do not depend on the length of the clip
    if not clip.complete and table.buckets.frame_extraction != "head":
        return 0
    return len(spans(table, clip.kept_frames, lengths))


@dataclass
class _ItemTensors:
    """Tensors that were read for one item: its media, or one of its captions."""

    path: Path
    tensors: dict[str, Tensor]
    variable_length: frozenset[str] = frozenset()  # names of tensors with variable length
    caption: str = ""
    is_empty: bool = False  # whether the caption is known to be empty
    origins: tuple[data.CacheOrigin, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a text cache


@dataclass(frozen=True)
class _Reader:
    """Reads the cached media and captions of batches, and checks them."""

    stores: Stores
    latent: data.LatentSpec
    commands: CachingCommands
    checks: CacheChecks
    encoded: Mapping[int, Mapping[str, Tensor]]  # by position in the batch
    reads_rejected: bool

    def read_media(self, item: TrainingItem, position: int, is_mirrored: bool) -> _ItemTensors:
        """Read an item's latents, or the mirrored ones, and its audio latents if there are any.

        `position` is the item's index in the batch.
        """
        # tensors of items that are encoded during training come from memory, all others from a cache
        encoded = self.encoded.get(position)
        if encoded is not None:
            media = _ItemTensors(item.latent_path, dict(encoded))
        else:
            media = self._read_cached_media(item)
        self.checks.add(item.table.index, item.key)
        tensors = {key: tensor for key, tensor in media.tensors.items() if not key.endswith(FLIPPED)}
        if is_mirrored:
            # mirrored tensors take the names of those that they replace
            mirrored = {}
            for key, tensor in media.tensors.items():
                if key.endswith(FLIPPED):
                    mirrored[key.removesuffix(FLIPPED)] = tensor
            if data.LOSS_MASK in media.tensors:  # caches have no mirrored masks
                mirrored[data.LOSS_MASK] = media.tensors[data.LOSS_MASK].flip(-1)
            tensors |= mirrored
        if not self.reads_rejected:  # items with and without rejected latents may share a batch
            tensors.pop(data.REJECTED_LATENTS, None)
        # always removed, because few models are conditioned on sizes
        cached_sizes = tensors.pop(data.FOREIGN_SIZES, None)
        if self.latent.has_size_conditions:
            tensors[data.SIZES] = _size_conditions(item, cached_sizes, is_mirrored)
        media.tensors = tensors
        return media

    def _read_cached_media(self, item: TrainingItem) -> _ItemTensors:
        """Read an item's latents, and its audio if it is cached in a separate file."""
        media = self._read_entry(
            item,
            path=item.latent_path,
            part=data.LATENTS_PART,
            key="latents",
            find_errors=latent_errors,
        )
        if item.has_cached_audio:
            audio = self._read_entry(
                item,
                path=item.audio_path,
                part=data.AUDIO_PART,
                key=data.AUDIO_LATENTS,
                find_errors=audio_errors,
            )
            for name in (data.AUDIO_LATENTS, data.REFERENCE_AUDIO):
                if name in audio.tensors:
                    media.tensors[name] = audio.tensors[name]
            media.origins += audio.origins
        # other programs do not record the frame rate, so the rate that the family assumes is used
        if self.latent.default_fps is not None and data.FPS not in media.tensors:
            media.tensors[data.FPS] = torch.tensor(self.latent.default_fps)
        return media

    def read_texts(self, items: Sequence[TrainingItem], caption_indices: Sequence[int]) -> list[_ItemTensors]:
        """Read one caption of each item: its cached embeddings, or only the text if it is not cached.

        `caption_indices` contains the index of each item's caption; EMPTY is the empty prompt.
        """
        texts = []
        for item, caption_index in zip(items, caption_indices, strict=True):
            new_caption = self.stores.new_captions.get((item.table.index, item.source_stem))
            if new_caption is not None and caption_index != EMPTY:
                texts.append(_read_new_caption(item, new_caption))
                continue
            caption = ""
            if item.cache_info.on_the_fly_sources:
                caption = item.cache_info.on_the_fly_caption(item.source_stem, caption_index)
            if item.cache_info.has_cached_texts:
                texts.append(self._read_cached_text(item, caption_index, caption))
                continue
            # a caption counts as empty only if it is known: "" may also mean that no file records it
            is_known = caption_index == EMPTY or bool(item.cache_info.on_the_fly_sources)
            path = item.caption_path(caption_index)
            texts.append(_ItemTensors(path, {}, caption=caption, is_empty=is_known and not caption))
        return texts

    def _read_cached_text(self, item: TrainingItem, number: int, caption: str) -> _ItemTensors:
        """Read and check the cached embeddings of an item's caption `number`; EMPTY is the empty prompt."""
        # `caption` is the caption if it is read during training, or "", which the cache's record replaces.
        path = item.caption_path(number)
        store = self.stores.text_store(item.table)
        with _add_caching_command(self.commands, store, is_text=True):
            entry = store.read(path.name)
            if not item.cache_info.text_keys <= entry.tensors.keys():
                absent = sorted(item.cache_info.text_keys - entry.tensors.keys())
                maker = entry.metadata.get("architecture", "")
                made_for = f" (made for {maker})" if maker else ""
                raise CacheError(
                    f"{path}: the text cache is incomplete; it has no {', '.join(absent)}{made_for}"
                )
            records = text_records(entry)
            for record in records.values():
                verify_tensors(entry, record.crc32)
            # the empty prompt has no source; other texts are compared with theirs once in a run
            is_checked = number == EMPTY or (item.table.index, path.name) in self.checks.checked
            if not is_checked and not _is_unchanged_since_indexing(item, entry, path.name):
                errors = text_errors(item, number, records, is_shared=store.is_shared, checks=self.checks)
                _reject_outdated(entry.path, errors)
        self.checks.add(item.table.index, path.name)
        if not caption:  # caches of other programs may not record it
            recorded = next((record.caption for record in records.values()), None)
            caption = entry.metadata.get("caption1", "") if recorded is None else recorded
        # a caption counts as empty only if it is known: "" may also mean that no file records it
        is_known = number == EMPTY or bool(records) or "caption1" in entry.metadata
        return _ItemTensors(
            path,
            entry.tensors,
            variable_length=entry.variable,
            caption=caption,
            is_empty=is_known and not caption,
            origins=tuple(data.CacheOrigin(path, name, record.encoder) for name, record in records.items()),
            metadata=entry.metadata,
        )

    def _read_entry(
        self,
        item: TrainingItem,
        path: Path,
        part: str,
        key: str,
        find_errors: Callable[..., Iterator[str]],
    ) -> _ItemTensors:
        """Read and check one latent or audio cache file."""
        store = self.stores.latent_store(item.table)
        with _add_caching_command(self.commands, store, is_text=False):  # adds the command to errors
            entry = store.read(path.name)
            tensors = entry.tensors
            record = latent_record(entry)
            if key not in tensors:
                raise CacheError(
                    f"{path}: it has no {key}, so it is not a cache; move it out of the cache folder"
                )
            if not _is_unchanged_since_indexing(item, entry, path.name):
                errors = find_errors(
                    item,
                    tensors=tensors,
                    record=record,
                    latent=self.latent,
                    checks=self.checks,
                    is_shared=store.is_shared,
                )
                _reject_outdated(path, errors)
            if record is not None:
                verify_tensors(entry, record.crc32)
        origins: tuple[data.CacheOrigin, ...] = ()
        if record is not None:
            origins = (self._describe_origin(item, path, part, tensors=tensors, record=record),)
        return _ItemTensors(path, tensors, entry.variable, origins=origins)

    def _describe_origin(
        self,
        item: TrainingItem,
        path: Path,
        part: str,
        tensors: Mapping[str, Tensor],
        record: LatentRecord,
    ) -> data.CacheOrigin:
        """Return which encoder and program version made cached latents or audio."""
        is_video = item.table.kind == "video"
        has_companions = any(name.startswith((data.CONTROL, data.LOSS_MASK)) for name in tensors)
        is_older = is_video and record.decoding_version < AS_SHOWN
        return data.CacheOrigin(
            path=path,
            part=part,
            encoder=record.encoder,
            # records of early versions lack CLOCK: those versions timed companions separately from the clip
            has_separate_timing=is_video and CLOCK not in record.options and has_companions,
            windows=_count_windows(item, record, self.latent.lengths),  # items into which the clip was cut
            earlier_decoder_version=record.decoding_version if is_older else None,
        )


def _is_unchanged_since_indexing(item: TrainingItem, entry: Entry, name: str) -> bool:
    """Return whether a cache file is still the one that was verified when the index of caches was built."""
    indexed = item.cache_info.indexed_checksums
    return name in indexed and indexed[name] == entry.metadata.get(CHECK_KEY)


def _reject_outdated(path: Path, errors: Iterator[str]) -> None:
    """Raise CacheError with the first reason why a cache does not match its table, if there is one."""
    error = next(errors, None)
    if error is not None:
        raise CacheError(f"{path}: {error}")


def _size_conditions(item: TrainingItem, cached_sizes: Tensor | None, is_mirrored: bool) -> Tensor:
    """Return SDXL's size conditions for an image: original size, crop corner, target size."""
    # `cached_sizes` are those that another trainer wrote into the cache: width, height, and the edges of the
    # crop (left, top, right, bottom). They take precedence over computed ones.
    bucket_width, bucket_height = item.bucket[:2]
    if cached_sizes is None:
        name = parse_latent_name(item.file_name, item.cache_info.tag, item.table.kind)
        assert name is not None  # items are found by such names
        width, height = name.size
        left, top, right, _ = inner_box(name.size, (bucket_width, bucket_height))
    else:
        width, height, left, top, right, _ = cached_sizes.tolist()
    if is_mirrored:  # the distance to the right edge becomes the distance to the left edge
        left = bucket_width - right
    # original size, top left corner of the crop, target size
    return torch.tensor((height, width, top, left, bucket_height, bucket_width), dtype=torch.float32)


def stores_for(item: TrainingItem, latent: data.LatentSpec) -> Stores:
    """Return the stores that read the cache files of the item's model family."""
    return Stores(NpzNames(item.cache_info.tag, latent, item.cache_info.text_keys))


def _stack(
    items: Sequence[_ItemTensors], commands: CachingCommands, is_text: bool
) -> dict[str, Tensor | list[Tensor]]:
    """Stack the tensors of all items by name; {} if there are no items."""
    if not items:
        return {}
    first_item = items[0]
    for item in items:
        unequal = item.tensors.keys() ^ first_item.tensors.keys()
        if unequal:
            raise CacheError(
                f"{item.path} and {first_item.path} do not have the same tensors: "
                f"{', '.join(sorted(unequal))}.\n"
                f"  Cache them again with the same options: {commands.get(is_text)}"
            )
    stacked: dict[str, Tensor | list[Tensor]] = {}
    for name in first_item.tensors:
        tensors = [item.tensors[name] for item in items]
        if name in first_item.variable_length:  # lengths differ, so these stay a list
            stacked[name] = tensors
            continue
        if len(items) > 1:
            _check_shapes(items, name, commands, is_text=is_text)
        stacked[name] = torch.stack(tensors)
    return stacked


def _check_shapes(items: Sequence[_ItemTensors], name: str, commands: CachingCommands, is_text: bool) -> None:
    """Raise CacheError if the tensor `name` does not have the same shape in all items."""
    first = items[0]
    expected = first.tensors[name].shape
    for item in items:
        shape = item.tensors[name].shape
        if shape != expected:
            raise CacheError(
                f"{item.path}: {name} has the shape {format_shape(shape)}, but in {first.path} it has "
                f"{format_shape(expected)}.\n  Make both again with the same options: {commands.get(is_text)}"
            )


def _prepend_references(tensors: dict[str, Tensor | list[Tensor]]) -> None:
    """Prepend reference latents, each B C 1 H W, to the clip latents along the frame axis, in place."""
    # The loss mask, if any, is padded with ones: reference frames count in the loss, too.
    names = sorted(name for name in tensors if name.startswith(data.REFERENCE_LATENTS))
    if not names:
        return
    # along the frame axis, references stand in descending order of their numbers, then the clip
    names.sort(key=lambda name: int(name.rpartition("_")[2]), reverse=True)
    references = [tensors[name] for name in names]
    for name in {"latents", data.REJECTED_LATENTS} & tensors.keys():
        tensors[name] = torch.cat([*references, tensors[name]], dim=2)  # type: ignore[list-item]
    mask = tensors.get(data.LOSS_MASK)
    if isinstance(mask, Tensor):
        # B F H W, padded at the beginning of F
        tensors[data.LOSS_MASK] = functional.pad(mask, (0, 0, 0, 0, len(names), 0), value=1.0)


@contextlib.contextmanager
def _add_caching_command(commands: CachingCommands, store: CacheStore, is_text: bool) -> Iterator[None]:
    """Add the caching command that repairs the file to every CacheError in the block."""
    try:
        yield
    except CacheError as error:
        command = commands.get(is_text)
        if store.is_shared:
            raise CacheError(
                f"{error}.\n  Training with --cache_latents_to_disk and "
                "--cache_text_encoder_outputs_to_disk, but without --skip_cache_check, replaces caches that "
                f"do not fit; first remove damaged npz files. With cache_format npz: {command}"
            ) from error
        # without --verify, caching does not read the values of many entries
        flag = " --verify" if "damaged" in str(error) else ""
        raise CacheError(f"{error}.\n  Make it again with: {command}{flag}") from error
