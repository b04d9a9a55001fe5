"""From a source to what a family encodes: decode it, cut its items out, put those of one size together."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.cache.files import FLIPPED, FORMAT_VERSION, LatentName, checksum, tensor_key
from dataset.cache.records import ClipFacts, FileIdentity, LatentRecord, identify, latent_metadata
from dataset.cache.store import CacheStore
from dataset.caching.existing import Names, media_table
from dataset.caching.planning import Recipe, SourcePlan, complete
from dataset.caching.prefetch import check_memory
from dataset.config import DatasetTable
from dataset.sources.cogvideox import measure, read_moments
from dataset.sources.decoding import NO_FRAMES, DecodedSource, decode_source
from dataset.sources.fetching import fetch
from dataset.sources.frames import Span, frames_wanted
from dataset.sources.sound import kept_rate
from modules.checkpoints.finite import is_finite
from modules.contract.data import CacheEntry, MediaBatch, MediaEncoders
from modules.contract.family import Caches
from modules.devices import free_memory, warn_if_emulated
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
class Pending:
    """An item to encode, which waits until its batch is full."""

    table: DatasetTable
    name: LatentName
    span: Span
    record: LatentRecord  # without checksums
    crop: Crop
    there: Names  # its existing cache files
    rate: float | None = None  # frames in a second, for models that are told

    @property
    def size_bytes(self) -> int:
        """Return the bytes of its frames and of its mask."""
        mask = 0 if self.crop.mask is None else self.crop.mask.nbytes
        return mask + sum(tensor.nbytes for tensor in self.crop.tensors)


def decode(plan: SourcePlan, existing: Names, recipe: Recipe) -> tuple[SourcePlan, Iterable[Pending]]:
    """Read the frames of a source, or its moments; return its plan, complete, and its missing items.

    Items that overlap, or are large, are cut out one by one when they are asked for. Raises MediaError,
    DatasetError or OSError if the source cannot be used.
    """
    source, clip, latent, rate = plan.source, None, recipe.latent, None
    if source.tensors is not None:
        paths = [path for path, _ in source.parts]
        # copies: a file that is mapped can change, and Windows does not replace it
        moments = tuple(read_moments(path, latent).clone() for path in paths)
        given = measure(moments[0], latent, paths[0])
        if len(moments) > 1 and moments[1].shape != (moments[0].shape[0], 1, *moments[0].shape[2:]):
            raise MediaError(f"{paths[1]} is not of a single frame of the size of {paths[0]}")
        span = given.span(latent.frame_step)
        media = DecodedSource(source, given.size, given.size, NO_FRAMES, (), (span,), None)
        clip = ClipFacts(given.size, given.frames, complete=True)
        crop = Crop(torch.from_numpy(NO_FRAMES), (), None, moments=moments)
        files = tuple(itertools.starmap(identify, source.parts))
        rate = kept_rate(source, recipe.fps) if recipe.has_rates else None
        return plan, list(_missing_items(plan, media, existing, recipe, files, clip, crop, rate))
    with fetch(source) as here:
        check_memory(here)
        rate = kept_rate(here, recipe.fps) if recipe.has_rates else None
        media = decode_source(
            here, recipe.fps, latent.pixel_step, latent.frame_step, keeps_alpha=latent.masks_latents
        )
    media = dataclasses.replace(media, source=source)
    if min(media.bucket) < SMALLEST_SIDE:
        width, height = media.bucket
        raise MediaError(
            f"{source.path}: {width}x{height} pixels are too few to encode; each side needs at least "
            f"{SMALLEST_SIDE}"
        )
    plan = complete(plan, media, existing, recipe)
    if source.table.kind == "video":
        enough, length = frames_wanted(source.table), len(media.frames)
        # decoding stops early where there are enough: then there may be more
        clip = ClipFacts(media.size, length, complete=enough is None or length < enough)
    files = tuple(itertools.starmap(identify, source.parts)) if plan.missing else ()
    items = _missing_items(plan, media, existing, recipe, files, clip, rate=rate)
    is_large = sum(clip.nbytes for clip in (media.frames, *media.control)) > PARTIAL_BYTES
    overlaps = sum(length for _, length in plan.missing or ()) > len(media.frames)
    return plan, items if is_large or overlaps else list(items)


def _missing_items(
    plan: SourcePlan,
    media: DecodedSource,
    existing: Names,
    recipe: Recipe,
    files: tuple[FileIdentity, ...],
    clip: ClipFacts | None,
    crop: Crop | None = None,
    rate: float | None = None,
) -> Iterator[Pending]:
    """Yield the items that a plan lacks. crop: of the only one, if it is not cut out of frames. rate: frames
    in a second, if they are told.
    """
    source, table = plan.source, plan.source.table
    of_table = recipe.table_options(source)
    for span in plan.missing or ():
        size, of_span = (media.size, None) if table.kind == "image" else (media.bucket, span)
        options = {"size": [*media.size], "bucket": [*media.bucket], "span": [*span], **of_table}
        options |= source.control_keys
        yield Pending(
            table,
            LatentName(source.stem, size, of_span),
            span,
            LatentRecord(recipe.encoder, options, files, clip, parts=0, crc32={}),
            crop or cut(media, span),
            {file: one for file, one in existing.items() if (one.size, one.span) == (size, of_span)},
            rate,
        )


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


class EncodersOnDemand:
    """The media encoders of a family, loaded when the first item is encoded."""

    def __init__(self, family: Caches, device: torch.device) -> None:
        self._family, self._device = family, device
        self._loaded: MediaEncoders | None = None

    def get(self) -> MediaEncoders:
        """Return the encoders. Raises CheckpointError if they cannot be loaded."""
        if self._loaded is None:
            self._loaded = self._family.media_encoders(self._device)
            vae = self._loaded.vae
            weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
            if weight is not None:
                warn_if_emulated(self._device, weight.dtype, "the VAE")
        return self._loaded

    def free(self) -> None:
        """Free the encoders and their memory, if they are loaded; the next `get` loads them again."""
        if self._loaded is not None:
            self._loaded = None
            free_memory(self._device)


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


def write_entry(
    store: CacheStore,
    family: Caches,
    file: str,
    named: Mapping[str, Tensor],
    record: LatentRecord,
    facts: Mapping[str, str],
) -> None:
    """Write a cache of latents with its record. named: tensors by their names in the file. facts: metadata.

    Raises OutputError, or CacheError if a value is NaN or infinite.
    """
    for name, tensor in named.items():
        require_finite(tensor, file, tensor_key(name))
    sums = {name: checksum(name, tensor) for name, tensor in named.items()}
    metadata = {"architecture": family.name, "format_version": FORMAT_VERSION, **facts}
    store.write(file, named, metadata | latent_metadata(dataclasses.replace(record, crc32=sums)))


def _stack_batch(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
