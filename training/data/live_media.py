"""Pictures that are encoded while training, and where else the parts of a batch come from.

Pictures that augmentation changes each time cannot be cached: the training process reads, changes and encodes
them once for each of their micro-batches. Their randomness is a function of the run's seed and the
micro-batch's number, as that of noise and timesteps.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataset.batches.items import CachingCommands, LiveParts, LiveTable, TrainingItem
from dataset.batches.reading import read_batch
from dataset.cache.records import CacheChecks
from dataset.cache.store import Stores
from dataset.caching.existing import Caches
from dataset.caching.latents import Crop, EncodersOnDemand, batch_media, cut
from dataset.sources.decoding import IMAGE_SPANS, decode_source
from dataset.sources.frames import shrink_mask
from dataset.table import NO_AUGMENTATION, DatasetTable
from modules.contract.data import LOSS_MASK, Batch, LatentSpec
from modules.errors import DatasetError
from modules.seeds import derive_seed


class LiveMedia:
    """The media encoders of a family, kept while training, for pictures."""

    def __init__(self, family: Caches, tables: Mapping[int, LiveTable], device: torch.device) -> None:
        """tables: by index; those with `media` are encoded here."""
        self._family, self._tables = family, tables
        self._encoders = EncodersOnDemand(family, device)

    def load(self) -> None:
        """Load the encoders. Raises CheckpointError if they cannot be."""
        self._encoders.get()

    def encode(self, items: Sequence[TrainingItem], *stream: int | str) -> dict[int, dict[str, Tensor]]:
        """Encode the items of a batch that are not cached; return by their places tensors without batch
        dimension, on the CPU.

        stream: what random numbers are seeded by. Raises MediaError if a picture cannot be read, DatasetError
        if it has changed its size.
        """
        groups: dict[tuple[object, ...], list[tuple[int, Crop]]] = {}
        for place, item in enumerate(items):
            if not item.kind.has_latents:
                crop = self._read(item, random.Random(derive_seed(*stream, "picture", place)))
                key = (item.table.index, *(tensor.shape for tensor in crop.tensors))
                groups.setdefault(key, []).append((place, crop))
        found: dict[int, dict[str, Tensor]] = {}
        for pairs in groups.values():
            table = items[pairs[0][0]].table
            # another posterior sample each time, so the names that it is seeded by are others
            keys = ["-".join(map(str, (items[place].key, *stream, place))) for place, _ in pairs]
            found |= self._encode([place for place, _ in pairs], [crop for _, crop in pairs], keys, table)
        return found

    def _read(self, item: TrainingItem, numbers: random.Random) -> Crop:
        source = self._tables[item.table.index].sources[item.source_stem]
        # an item that is validated on has another table, which changes nothing
        source = dataclasses.replace(source, table=item.table)
        spec, fps = self._family.latent, self._family.defaults.fps
        changes = None if item.table.augmentation == NO_AUGMENTATION else numbers
        media = decode_source(source, fps, spec.pixel_step, spec.frame_step, changes)
        if media.bucket != item.bucket:
            sides = "x".join(map(str, media.size))
            raise DatasetError(f"{source.path} has {sides} pixels now, not those that it had at the start")
        return cut(media, IMAGE_SPANS[0])

    def _encode(
        self, places: Sequence[int], crops: Sequence[Crop], keys: Sequence[str], table: DatasetTable
    ) -> dict[int, dict[str, Tensor]]:
        media = batch_media(crops, keys, IMAGE_SPANS * len(crops), table)
        with torch.no_grad():
            encoded = self._family.encode_media(self._encoders.get(), media)
        found = {}
        for place, crop, (entry,) in zip(places, crops, encoded, strict=True):
            tensors = {key: tensor.detach().cpu() for key, tensor in entry.tensors.items()}
            if crop.mask is not None:
                tensors[LOSS_MASK] = shrink_mask(crop.mask, self._family.latent.stride)
            found[place] = tensors
        return found


@dataclass(frozen=True)
class BatchSources:
    """Sources of the parts of a run's batches: caches, and encoding while training."""

    stores: Stores = field(default_factory=Stores)
    tables: Mapping[int, LiveTable] = field(default_factory=dict)  # with a part that is not cached, by index
    media: LiveMedia | None = None  # None: all latents are cached
    # whether batches must be made in the training process: what they need is not sent to others
    stays: bool = False

    def read(
        self,
        items: Sequence[TrainingItem],
        latent: LatentSpec,
        commands: CachingCommands,
        checks: CacheChecks,
        stream: Sequence[int | str],
        captions: Sequence[int] | None = None,
        flips: Sequence[bool] = (),
    ) -> Batch:
        """Read a batch; encode those of its pictures that are not cached.

        stream: the seed of random numbers. captions, flips: see `read_batch`. Raises CacheError, or as
        `LiveMedia.encode`.
        """
        encoded = {} if self.media is None else self.media.encode(items, *stream)
        # what is encoded now has been mirrored already
        sides = [flip and place not in encoded for place, flip in enumerate(flips)]
        live = LiveParts(self.tables, encoded)
        return read_batch(items, latent, commands, checks, captions, self.stores, sides, live)
