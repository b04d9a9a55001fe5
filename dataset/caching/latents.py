"""Turn sources into cache entries: decode, cut out items, encode items of equal size together, write."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataset import cache_files
from dataset.cache import records
from dataset.cache.records import LatentRecord, identify
from dataset.cache.store import LatentNames
from dataset.cache_files import CacheStore
from dataset.caching.planning import LatentCacheSettings, SourcePlan, SourcePlanner
from dataset.caching.precomputed import decode_moments
from dataset.caching.prefetch import check_memory
from dataset.sources.audio import SpanAudios, read_span_audios
from dataset.sources.decoding import DecodedMedia, decode_source
from dataset.sources.fetching import fetch
from dataset.sources.frames import kept_rate, media_table, shrink_mask
from dataset.sources.media_source import MediaSource
from modules.devices import warn_if_emulated
from modules.errors import MediaError
from protocols import data
from protocols.family import Caches

PARTIAL_BYTES = 1 << 29  # limit for the frames of items that wait until their batch is full

SMALLEST_SIDE = 8  # pixels; less than one latent in either direction cannot be encoded


def decode(
    plan: SourcePlan, existing: LatentNames, cache_settings: LatentCacheSettings
) -> tuple[SourcePlan, Iterable[DecodedMedia]]:
    """Decode a source and cut out the items that are not cached yet.

    Large or overlapping items are only cut out when they are iterated over, to save memory.

    Returns:
        The plan, completed by what decoding found out, and the missing items.

    Raises:
        MediaError: If the source cannot be read or is too small.
        DatasetError: If the resolution does not fit the model.
        OSError: If a file cannot be opened.
    """
    source = plan.source
    media = _decode_frames(source, cache_settings)
    if plan.missing_spans is None:  # the number of frames was unknown until the source was decoded
        planner = SourcePlanner(source, existing.of(source.stem), cache_settings)
        plan = planner.compare(media.size, media.spans, len(media.frames), media.reason)
    if media.clip is not None:
        plan = dataclasses.replace(plan, size_changes=media.clip.size_changes)
    spans_to_encode = plan.missing_spans or ()
    audios: SpanAudios | None = None
    if cache_settings.stores_audio and spans_to_encode and source.table.kind == "video":
        # for a model that stores audio with latents

        assert cache_settings.audio is not None  # implied by `stores_audio`
        with fetch(source) as local:
            audios = read_span_audios(local, spans_to_encode, cache_settings.fps, cache_settings.audio)
        plan = dataclasses.replace(plan, silence_reason=audios.silence_reason)
    # identities of the source files, for the record
    files = tuple(itertools.starmap(identify, cache_settings.source_files(source))) if spans_to_encode else ()
    media = dataclasses.replace(media, source=source, files=files)
    items: Iterable[DecodedMedia] = map(media.cut, spans_to_encode)
    if audios is not None:
        items = _add_audios(items, audios)
    is_large = sum(clip.nbytes for clip in (media.frames, *media.control)) > PARTIAL_BYTES
    are_overlapping = sum(length for _, length in spans_to_encode) > len(media.frames)
    if not is_large and not are_overlapping:
        items = list(items)  # cut out by the thread that decodes
    return plan, items


def _decode_frames(source: MediaSource, cache_settings: LatentCacheSettings) -> DecodedMedia:
    """Decode a source at bucket size, or read its precomputed moments of the VAE; add its frame rate."""
    latent = cache_settings.latent
    if source.precomputed is not None:
        media = decode_moments(source, latent)
        rate = kept_rate(source, cache_settings.fps) if cache_settings.stores_frame_rate else None
        return dataclasses.replace(media, rate=rate)
    with fetch(source) as local:
        check_memory(local)
        rate = kept_rate(local, cache_settings.fps) if cache_settings.stores_frame_rate else None
        media = decode_source(
            local,
            cache_settings.fps,
            latent.pixel_step,
            latent.lengths,
            keeps_alpha=latent.keeps_alpha,
            has_alpha=latent.has_alpha,
        )
    width, height = media.bucket
    if min(width, height) < SMALLEST_SIDE:
        raise MediaError(
            f"{source.path}: {width}x{height} pixels are too few to encode; each side needs at least "
            f"{SMALLEST_SIDE}"
        )
    return dataclasses.replace(media, rate=rate)


def _add_audios(items: Iterable[DecodedMedia], audios: SpanAudios) -> Iterator[DecodedMedia]:
    """Yield the decoded items of a clip with the audio of their spans added."""
    for item, samples in zip(items, audios.samples, strict=True):
        yield dataclasses.replace(item, audio=samples, is_heard=audios.silence_reason is None)


def load_encoders(family: Caches, device: torch.device) -> data.MediaEncoders:
    """Load the networks that encode images and clips for a model family.

    Raises:
        CheckpointError: If an encoder cannot be loaded.
    """
    loaded = family.media_encoders(device)
    weight = next(loaded.vae.parameters(), None) if isinstance(loaded.vae, nn.Module) else None
    if weight is not None:
        warn_if_emulated(device, weight.dtype, "the VAE")
    return loaded


def batch_media(items: Sequence[DecodedMedia], keys: Sequence[str]) -> data.MediaBatch:
    """Stack items of equal shapes into one batch for the encoders.

    `keys` are the names of the items, without suffix.
    """
    first = items[0]
    alphas = [item.alpha for item in items if item.alpha is not None]
    control_masks = [item.control_mask for item in items if item.control_mask is not None]
    audios = [item.audio for item in items if item.audio is not None]
    # transposed: the first control images of all items, then their second ones, and so on
    controls = zip(*(item.control for item in items), strict=True)
    references = zip(*(item.references for item in items), strict=True)
    return data.MediaBatch(
        frames=_stack_batch([item.frames for item in items]),
        keys=tuple(keys),
        spans=tuple(item.spans[0] for item in items),
        control=tuple(_stack_batch(arrays) for arrays in controls),
        alpha=_stack_batch(alphas) if alphas else None,
        references=tuple(_stack_batch(arrays) for arrays in references),
        control_mask=_stack_batch(control_masks) if control_masks else None,
        table=media_table(
            first.source.table, has_control=bool(first.control), has_guides=bool(first.source.guides)
        ),
        audio=torch.stack(audios) if audios else None,
        has_audio=tuple(item.is_heard for item in items),
        row_references=tuple(item.source.row_references for item in items),
    )


def encode(
    items: Sequence[DecodedMedia], keys: Sequence[str], family: Caches, encoders: data.MediaEncoders | None
) -> Sequence[Sequence[data.CacheEntry]]:
    """Encode a batch; return each item's cache entries, including mirrored latents if its table has flip_aug.

    Args:
        items: Decoded items of equal shapes, all of one table.
        keys: Names of the items, without suffix.
        family: Family that encodes.
        encoders: The family's encoders; None if the items have precomputed moments.
    """
    if items[0].moments:
        return _latents_from_moments(items, keys, family)
    assert encoders is not None
    media = batch_media(items, keys)
    all_rejected = [item.rejected for item in items if item.rejected is not None]
    needs_mirrored = items[0].source.table.buckets.augmentation.flip
    if not all_rejected and not needs_mirrored:
        return family.encode_media(encoders, media)
    rejected = _stack_batch(all_rejected) if all_rejected else None  # B F H W C
    encoded = _encode_pair(media, rejected, family, encoders)  # rejected latents are in the same entries
    if not needs_mirrored:
        return encoded
    mirrored_rejected = None if rejected is None else rejected.flip(3)  # axis 3 is W
    mirrored = _encode_pair(_mirror(media), mirrored_rejected, family, encoders)
    with_mirrored = []
    for entries, mirrored_entries in zip(encoded, mirrored, strict=True):
        pairs = zip(entries, mirrored_entries, strict=True)
        with_mirrored.append([_add_mirrored(entry, mirrored_entry) for entry, mirrored_entry in pairs])
    return with_mirrored


def _latents_from_moments(
    items: Sequence[DecodedMedia], keys: Sequence[str], family: Caches
) -> list[list[data.CacheEntry]]:
    """Return a cache entry for each item of a batch with precomputed VAE moments; no encoder runs."""
    moments_by_part = zip(*(item.moments for item in items), strict=True)
    # moments of the clips and, for image-to-video models, of their first frames
    moments, *first_frame_moments = [torch.stack(tensors) for tensors in moments_by_part]
    batch = data.MomentsBatch(moments, tuple(keys), *first_frame_moments)
    return [[entry] for entry in family.latents_from_moments(batch)]


def _encode_pair(
    media: data.MediaBatch, rejected: Tensor | None, family: Caches, encoders: data.MediaEncoders
) -> Sequence[Sequence[data.CacheEntry]]:
    """Encode a batch; latents of its rejected clips, if there are any, are added to the same entries."""
    encoded: Sequence[Sequence[data.CacheEntry]] = family.encode_media(encoders, media)
    if rejected is None:
        return encoded
    # `rejected` are the rejected clips, B F H W C uint8. The alpha channel of the chosen clips does not apply
    # to them and is dropped.
    # each item's entries with the latents of its rejected (worse) clip added
    encoded_rejected = family.encode_media(encoders, dataclasses.replace(media, frames=rejected, alpha=None))
    joined = []
    for entries, rejected_entries in zip(encoded, encoded_rejected, strict=True):
        pairs = zip(entries, rejected_entries, strict=True)
        joined.append([_add_rejected(entry, rejected_entry) for entry, rejected_entry in pairs])
    return joined


def _add_rejected(entry: data.CacheEntry, rejected: data.CacheEntry) -> data.CacheEntry:
    """Return a cache entry that also has the latents of the rejected image."""
    tensors = {**entry.tensors, data.REJECTED_LATENTS: rejected.tensors["latents"]}
    return dataclasses.replace(entry, tensors=tensors)


def _mirror(media: data.MediaBatch) -> data.MediaBatch:
    """Return the batch mirrored from left to right, for flip_aug; its item keys get a suffix."""
    return dataclasses.replace(
        media,
        frames=media.frames.flip(3),
        keys=tuple(f"{key}{cache_files.FLIPPED}" for key in media.keys),
        control=tuple(control.flip(3) for control in media.control),
        alpha=None if media.alpha is None else media.alpha.flip(2),
        references=tuple(reference.flip(3) for reference in media.references),
        control_mask=None if media.control_mask is None else media.control_mask.flip(3),
    )


def _add_mirrored(entry: data.CacheEntry, mirrored: data.CacheEntry) -> data.CacheEntry:
    """Return a cache entry with the tensors of the original and of the mirrored item."""
    tensors = dict(entry.tensors)
    for key, tensor in mirrored.tensors.items():
        is_mirrored = key.startswith("latents") or key == data.CONTROL_PIXELS
        if is_mirrored and not key.endswith("_audio"):  # audio latents have no left and right
            tensors[f"{key}{cache_files.FLIPPED}"] = tensor
    return dataclasses.replace(entry, tensors=tensors)


def name_tensors(item: DecodedMedia, entry: data.CacheEntry, spec: data.LatentSpec) -> dict[str, Tensor]:
    """Return all tensors of a cache entry, including loss mask and frame rate, by their names in the file.

    The names of latents contain their size and dtype. Image families store them without the frame axis.
    """
    tensors = {key: tensor.detach().cpu() for key, tensor in entry.tensors.items()}
    if item.mask is not None:
        mask = shrink_mask(torch.from_numpy(item.mask), spec.stride, spec.clip_frames)  # F H W of latents
        end = entry.start + tensors["latents"].shape[1]  # an entry may be one section of the item
        tensors[data.LOSS_MASK] = mask[entry.start : end].clone()
    if item.rate is not None:
        tensors[data.FPS] = torch.tensor(item.rate)
    tensors_by_name = {}
    for key, tensor in tensors.items():
        name = cache_files.tensor_name(
            key,
            tensor,
            variable=key in entry.variable,
            grid=entry.grid,
            has_frames=spec.names_frames,
        )
        # names of latents contain their grid
        is_flat = spec.flat_in_caches and cache_files.grid_in_name(name) is not None
        tensors_by_name[name] = tensor.squeeze(1) if is_flat else tensor
    return tensors_by_name


def write_entry(
    store: CacheStore,
    family: Caches,
    file: str,
    named: Mapping[str, Tensor],
    record: LatentRecord,
    additional_metadata: Mapping[str, str],
) -> None:
    """Write a latent cache file with its record.

    Args:
        store: Store to write to.
        family: Family that made the latents.
        file: Name of the cache file.
        named: Tensors by their names in the file.
        record: How the latents were made; checksums are added.
        additional_metadata: Further metadata.

    Raises:
        OutputError: If the file cannot be written.
        CacheError: If a value is NaN or infinite.
    """
    for name, tensor in named.items():
        records.require_finite(tensor, file, cache_files.tensor_key(name))
    checksums = {name: cache_files.checksum(name, tensor) for name, tensor in named.items()}
    metadata = {
        "architecture": family.name,
        "format_version": cache_files.FORMAT_VERSION,
        **additional_metadata,
        **records.record_metadata(dataclasses.replace(record, crc32=checksums)),
    }
    store.write(file, named, metadata)


def _stack_batch(arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Stack arrays along a new first dimension; a single array is not copied."""
    return torch.from_numpy(arrays[0][None] if len(arrays) == 1 else np.stack(arrays))
