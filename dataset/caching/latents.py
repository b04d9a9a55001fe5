"""Encode the items without a valid latent cache.

Threads decode ahead, batches hold items of one size, and files are written while later batches are encoded.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dataset.cache.files import (
    FLIPPED,
    FORMAT_VERSION,
    SUFFIX,
    LatentName,
    checksum,
    is_latent_cache,
    tensor_name,
)
from dataset.cache.index import fingerprint
from dataset.cache.records import (
    ClipFacts,
    FileIdentity,
    LatentRecord,
    identify,
    latent_facts,
    latent_metadata,
)
from dataset.cache.store import CacheStore
from dataset.caching.existing import Caches, ExistingNames, Names, names_of, remove_caches
from dataset.caching.planning import Recipe, SourcePlan, complete, media_table
from dataset.caching.prefetch import WriteBehind, check_memory, read_ahead
from dataset.caching.reports import Failure
from dataset.config import DatasetTable
from dataset.sources.decoding import NO_FRAMES, DecodedSource, decode_source
from dataset.sources.fetching import fetch
from dataset.sources.frames import Span, frames_wanted
from dataset.sources.masks import shrink_mask
from dataset.sources.moments import measure, read_moments
from modules.bars import Bar
from modules.checkpoints.finite import is_finite
from modules.contract.data import LOSS_MASK, CacheEntry, MediaBatch, MediaEncoders, MomentsBatch
from modules.devices import free_memory
from modules.errors import CacheError, MediaError

PARTIAL_BYTES = 1 << 29  # limit for the frames of items that wait until their batch is full

SMALLEST_SIDE = 8  # pixels: one latent


@dataclass(frozen=True)
class Crop:
    """The frames of one item."""

    frames: Tensor  # F H W C uint8
    control: tuple[Tensor, ...]  # each F H W C uint8
    alpha: Tensor | None  # H W uint8
    mask: Tensor | None = None  # F H W uint8: of the loss
    moments: tuple[Tensor, ...] = ()  # instead of frames: 2C F h w of the clip, then of its first frame alone

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the encoded tensors."""
        return (self.frames, *self.control, *(() if self.alpha is None else (self.alpha,)), *self.moments)


@dataclass(frozen=True)
class Decoded:
    """A source whose frames are in memory."""

    plan: SourcePlan  # its `missing` is known
    media: DecodedSource  # without frames if all crops are cut already
    crops: Mapping[Span, Crop]
    files: tuple[FileIdentity, ...]
    clip: ClipFacts | None


def decode(plan: SourcePlan, existing: Names, recipe: Recipe) -> Decoded:
    """Read the frames of a source, complete its plan, and hash its files if something is missing.

    Raises MediaError, DatasetError or OSError if the source cannot be used.
    """
    source = plan.source
    if source.tensors is not None:
        return take_moments(plan, recipe)
    with fetch(source) as here:
        check_memory(here)
        media = decode_source(here, recipe.fps, recipe.latent.pixel_step, recipe.latent.frame_step)
    media = dataclasses.replace(media, source=source)
    if min(media.bucket) < SMALLEST_SIDE:
        width, height = media.bucket
        raise MediaError(
            f"{source.path}: {width}x{height} pixels are too few to encode; each side needs at least "
            f"{SMALLEST_SIDE}"
        )
    plan, clip = complete(plan, media, existing, recipe), None
    if source.table.kind == "video":
        enough, length = frames_wanted(source.table), len(media.frames)
        # decoding stops early where there are enough: then there may be more
        clip = ClipFacts(media.size, length, complete=enough is None or length < enough)
    missing = plan.missing or ()
    files = tuple(itertools.starmap(identify, source.parts)) if missing else ()
    size_bytes = sum(clip.nbytes for clip in (media.frames, *media.control))
    if sum(length for _, length in missing) > len(media.frames) or size_bytes > PARTIAL_BYTES:
        # overlapping or large: cut each when its turn comes
        return Decoded(plan, media, {}, files, clip)
    crops = {span: cut(media, span) for span in missing}
    media = dataclasses.replace(media, frames=NO_FRAMES, control=(), mask=None)
    return Decoded(plan, media, crops, files, clip)


def take_moments(plan: SourcePlan, recipe: Recipe) -> Decoded:
    """Read the moments of a source that needs no decoding. Raises MediaError if they cannot be used."""
    source, latent = plan.source, recipe.latent
    assert source.tensors is not None
    paths = [path for path, _ in source.parts]
    # copies: a file that is mapped can change, and Windows does not replace it
    moments = tuple(read_moments(path, latent).clone() for path in paths)
    clip = measure(moments[0], latent, paths[0])
    if len(moments) > 1 and moments[1].shape != (moments[0].shape[0], 1, *moments[0].shape[2:]):
        raise MediaError(f"{paths[1]} is not of a single frame of the size of {paths[0]}")
    span = clip.span(latent.frame_step)
    media = DecodedSource(source, clip.size, clip.size, NO_FRAMES, (), (span,), None)
    crop = Crop(torch.from_numpy(NO_FRAMES), (), None, moments=moments)
    facts = ClipFacts(clip.size, clip.frames, complete=True)
    return Decoded(plan, media, {span: crop}, tuple(map(identify, paths)), facts)


def cut(media: DecodedSource, span: Span) -> Crop:
    """Cut a span out of a clip; copy it, to free the rest of the clip, unless it is most of the clip."""
    alone = 2 * span[1] < len(media.frames)
    frames, *control = (
        torch.from_numpy(clip.copy() if alone else clip)
        for clip in (media.crop(span), *media.control_crops(span))
    )
    mask = media.mask_crop(span)
    return Crop(
        frames,
        tuple(control),
        None if media.alpha is None else torch.from_numpy(media.alpha),
        None if mask is None else torch.from_numpy(mask.copy()),
    )


@dataclass(frozen=True)
class _Pending:
    """An item that waits until its batch is full."""

    table: DatasetTable
    name: LatentName
    span: Span
    record: LatentRecord  # without checksums
    crop: Crop
    there: Names  # its existing cache files

    @property
    def size_bytes(self) -> int:
        mask = 0 if self.crop.mask is None else self.crop.mask.nbytes
        return mask + sum(tensor.nbytes for tensor in self.crop.tensors)


class EncodersOnDemand:
    """The media encoders of a family, loaded when the first item is encoded."""

    def __init__(self, family: Caches, device: torch.device) -> None:
        self._family, self._device = family, device
        self._loaded: MediaEncoders | None = None

    def get(self) -> MediaEncoders:
        """Return the encoders. Raises CheckpointError if they cannot be loaded."""
        if self._loaded is None:
            self._loaded = self._family.media_encoders(self._device)
        return self._loaded

    def free(self) -> None:
        """Free the encoders and their memory; the next `get` loads them again."""
        self._loaded = None
        free_memory(self._device)


class LatentEncoding:
    """One run over the sources that need encoding. Its public attributes report the results."""

    def __init__(
        self, family: Caches, recipe: Recipe, encoders: EncodersOnDemand, batch_size: int | None
    ) -> None:
        self.finished: list[SourcePlan] = []
        self.failures: list[Failure] = []
        self.written: set[tuple[int, str]] = set()  # table index and name of each file
        self._family = family
        self._recipe = recipe
        self._batch_size = batch_size
        self._encoders = encoders
        # by what the items of a batch must have in common
        self._pending: dict[tuple[object, ...], list[_Pending]] = {}
        self._writer = WriteBehind()

    def run(
        self, plans: Sequence[SourcePlan], existing: ExistingNames, workers: int, show_progress: bool
    ) -> None:
        """Decode and encode the missing entries of the plans. Sources that cannot be read become failures.

        Raises CheckpointError if an encoder cannot be loaded, OutputError if a file cannot be written.
        """

        def work(plan: SourcePlan) -> Decoded:
            return decode(plan, names_of(existing, plan.source), self._recipe)

        bar = Bar(len(plans), "Encoding", "source", show_progress)
        ahead = read_ahead(plans, lambda plan: plan.source, work, workers, bar, decodes=True)
        with self._writer, contextlib.closing(ahead), torch.no_grad():
            for _, result in ahead:
                if isinstance(result, Failure):
                    self.failures.append(result)
                else:
                    self._add(result, names_of(existing, result.plan.source))
                del result  # frees its frames before waiting for the next source
            for group in list(self._pending):
                self._encode(group)

    def _add(self, decoded: Decoded, there: Names) -> None:
        """Put the missing items of a source into their batches; encode full batches."""
        plan, media, recipe, table = decoded.plan, decoded.media, self._recipe, decoded.plan.source.table
        self.finished.append(plan)
        of_table = recipe.table_options(plan.source)
        for span in plan.missing or ():
            of_name = (media.size, None) if table.kind == "image" else (media.bucket, span)
            options = {"size": [*media.size], "bucket": [*media.bucket], "span": [*span]}
            item = _Pending(
                table,
                LatentName(plan.source.stem, *of_name),
                span,
                LatentRecord(
                    recipe.encoder, options | of_table, decoded.files, decoded.clip, parts=0, crc32={}
                ),
                decoded.crops[span] if span in decoded.crops else cut(media, span),
                {file: other for file, other in there.items() if (other.size, other.span) == of_name},
            )
            group = (table.index, *(tensor.shape for tensor in item.crop.tensors))
            self._pending.setdefault(group, []).append(item)
            if len(self._pending[group]) >= (self._batch_size or table.batch_size):
                self._encode(group)
        sizes = {group: sum(item.size_bytes for item in items) for group, items in self._pending.items()}
        if sum(sizes.values()) > PARTIAL_BYTES:
            self._encode(max(sizes, key=lambda group: sizes[group]))

    def _encode(self, group: tuple[object, ...]) -> None:
        items = self._pending.pop(group)
        table, crops = items[0].table, [item.crop for item in items]
        # the names of the files, but for the sections that the family may make
        keys = [item.name.file_name(self._recipe.tag).removesuffix(SUFFIX) for item in items]
        if crops[0].moments:
            moments = [torch.stack(found) for found in zip(*(crop.moments for crop in crops), strict=True)]
            given = MomentsBatch(moments[0], tuple(keys), *moments[1:])
            encoded = [[entry] for entry in self._family.latents_from_moments(given)]
        else:
            encoders, media = (
                self._encoders.get(),
                batch_media(crops, keys, [item.span for item in items], table),
            )
            encoded = self._family.encode_media(encoders, media)
            if table.augmentation.flip:
                mirrored = self._family.encode_media(encoders, mirror_media(media))
                encoded = [
                    [add_mirrored(one, other) for one, other in zip(*sides, strict=True)]
                    for sides in zip(encoded, mirrored, strict=True)
                ]
        for item, entries in zip(items, encoded, strict=True):
            self._submit(item, entries)

    def _submit(self, item: _Pending, entries: Sequence[CacheEntry]) -> None:
        """Have an item's files written, and then its other files removed: sections that it no longer has."""
        names, crop = set(), item.crop
        store = self._recipe.stores.of(item.table)
        mask = None if crop.mask is None else shrink_mask(crop.mask, self._recipe.latent.stride)
        record = dataclasses.replace(item.record, parts=len(entries))
        for entry in entries:
            name = dataclasses.replace(item.name, section=entry.section)
            tensors = {key: tensor.detach().cpu() for key, tensor in entry.tensors.items()}
            if mask is not None:
                tensors[LOSS_MASK] = mask[entry.start : entry.start + tensors["latents"].shape[1]].clone()
            whole = dataclasses.replace(entry, tensors=tensors)
            self._writer.submit(partial(self._write, store, name, record, whole))
            names.add(name.file_name(self._recipe.tag))
        self.written |= {(item.table.index, name) for name in names}
        surplus = [name for name in item.there if name not in names]
        if surplus:
            self._writer.submit(
                partial(
                    remove_caches, store, surplus, partial(is_latent_cache, architecture=self._family.name)
                )
            )

    def _write(self, store: CacheStore, name: LatentName, record: LatentRecord, entry: CacheEntry) -> None:
        """Write one latent cache with its record.

        Raises OutputError, or CacheError if a value is NaN or infinite.
        """
        file = name.file_name(self._recipe.tag)
        for key, tensor in entry.tensors.items():
            require_finite(tensor, file, key)
        named = {tensor_name(key, tensor, grid=entry.grid): tensor for key, tensor in entry.tensors.items()}
        metadata = {
            "architecture": self._family.name,
            "width": str(name.size[0]),
            "height": str(name.size[1]),
            "format_version": FORMAT_VERSION,
        }
        if name.span is not None:
            metadata["frame_count"] = str(name.span[1])
        sums = {tensor: checksum(tensor, data) for tensor, data in named.items()}
        store.write(file, named, metadata | latent_metadata(dataclasses.replace(record, crc32=sums)))
        sources = fingerprint((one.size_bytes, one.mtime_ns) for one in record.files)
        self._recipe.index.of(store).note_written(file, store.stamp(file), sources, latent_facts(record))


def batch_media(
    crops: Sequence[Crop], keys: Sequence[str], spans: Sequence[Span], table: DatasetTable
) -> MediaBatch:
    """Return crops of equal shapes as a family encodes them."""
    alphas = [crop.alpha for crop in crops if crop.alpha is not None]
    return MediaBatch(
        frames=_stack_batch([crop.frames for crop in crops]),
        keys=tuple(keys),
        spans=tuple(spans),
        control=tuple(
            _stack_batch(controls) for controls in zip(*(crop.control for crop in crops), strict=True)
        ),
        alpha=_stack_batch(alphas) if alphas else None,
        table=media_table(table, bool(crops[0].control)),
    )


def mirror_media(media: MediaBatch) -> MediaBatch:
    """Return the items with left and right exchanged."""
    return dataclasses.replace(
        media,
        frames=media.frames.flip(3),
        keys=tuple(f"{key}{FLIPPED}" for key in media.keys),
        control=tuple(control.flip(3) for control in media.control),
        alpha=None if media.alpha is None else media.alpha.flip(2),
    )


def add_mirrored(entry: CacheEntry, mirrored: CacheEntry) -> CacheEntry:
    """Return an entry with the latents of its mirrored media too."""
    more = {f"{key}{FLIPPED}": one for key, one in mirrored.tensors.items() if key.startswith("latents")}
    return dataclasses.replace(entry, tensors={**entry.tensors, **more})


def require_finite(tensor: Tensor, item: str, key: str) -> None:
    """Raise CacheError if a value that would be cached is NaN or infinite, which would spread through all of
    training.
    """
    if is_finite(tensor):
        return
    wrong = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
    raise CacheError(
        f"{item}: {wrong} of {tensor.numel()} values of {key} are NaN or infinite, so it is not cached.\n"
        "  Give the encoder a wider dtype (bfloat16 or float32 instead of float16), or another file."
    )


def _stack_batch(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
