"""Pictures and texts that are encoded while training, and where else the parts of a batch come from.

Pictures that augmentation changes each time cannot be cached: the training process reads, changes and encodes
them once for each of their micro-batches. Their randomness is a function of the run's seed and the
micro-batch's number, as that of noise and timesteps. Text encoders stay loaded beside the network if captions
vary, if they learn, or if there are no caches; every process encodes the captions of its own micro-batches.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dataset.batches.items import CachingCommands, LiveParts, LiveTable, TrainingItem
from dataset.batches.reading import read_batch
from dataset.cache.records import CacheChecks
from dataset.cache.store import Stores
from dataset.caching.existing import Caches
from dataset.caching.latents import Crop, EncodersOnDemand, batch_media, cut
from dataset.sources.decoding import IMAGE_SPANS, decode_source
from dataset.sources.frames import shrink_mask
from dataset.table import NO_AUGMENTATION, DatasetTable
from modules.contract.data import LOSS_MASK, Batch, Conditions, LatentSpec
from modules.contract.family import LearningEncoder, TextEncoder, can_divide
from modules.contract.loading import BlockPlace
from modules.contract.requests import Prompt, Prompts
from modules.contract.steps import EncodedPrompts
from modules.errors import DatasetError
from modules.offload.sharding import take_turns
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
        source = replace(source, table=item.table)
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
        undropped: Sequence[int] = (),
    ) -> Batch:
        """Read a batch; encode those of its pictures that are not cached.

        stream: the seed of random numbers. captions, flips, undropped: see `read_batch`. Raises CacheError,
        or as `LiveMedia.encode`.
        """
        encoded = {} if self.media is None else self.media.encode(items, *stream)
        # what is encoded now has been mirrored already
        sides = [flip and place not in encoded for place, flip in enumerate(flips)]
        live = LiveParts(self.tables, encoded)
        return read_batch(items, latent, commands, checks, captions, self.stores, sides, live, undropped)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveTexts:
    """Hold the text encoders that stay loaded; none may. Outputs of all others come from caches."""

    encoders: Sequence[TextEncoder]
    learning: Sequence[LearningEncoder] = ()  # those of them that get a network, in their order
    able: Sequence[str] = ()  # prefixes of all encoders that could learn, in the order of their rates

    @property
    def keys(self) -> frozenset[str]:
        """Return the names of the tensors that they make."""
        return frozenset().union(*(encoder.keys for encoder in self.encoders))

    def load(self, device: torch.device, blocks: BlockPlace | None = None) -> None:
        """Load all encoders, frozen. blocks: splits over processes those that do not learn."""
        for encoder in self.encoders:
            if blocks is not None and can_divide(encoder) and not self._learns(encoder):
                encoder.blocks = blocks
            encoder.load(device)
        for encoder in self.learning:
            encoder.network.requires_grad_(False)
        if names := " and ".join(encoder.name for encoder in self.encoders):
            logger.info("Captions are encoded while training, by %s.", names)

    def free(self) -> None:
        """Free all encoders."""
        for encoder in self.encoders:
            encoder.free()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that learn by the prefixes of their names in LoRA files. Call `load` first."""
        return {encoder.lora_prefix: encoder.network for encoder in self.learning}

    def add_to(self, batch: Batch) -> Batch:
        """Return a batch with the outputs of these encoders for its captions, B first; on the CPU.

        Gradients flow to trained parts, if they are on. Other encoders are asked without.
        """
        if not self.encoders:
            return batch
        prompts = [Prompt(caption) for caption in batch.captions]
        tensors = dict(batch.tensors)
        for encoder in self.encoders:
            encoded = self._encode(encoder, prompts)
            for name in encoder.keys:
                tensors[name] = _stack([one[name] for one in encoded], name in encoder.variable_length)
        return replace(batch, tensors=tensors)

    def renew(
        self, wanted: Mapping[int, Prompts], known: Mapping[int, EncodedPrompts]
    ) -> dict[int, EncodedPrompts]:
        """Return the encoded texts of a sample, anew from the encoders that learn.

        wanted: its texts by section; `known` has all their outputs. Conditions have no batch dimension.
        """
        with torch.no_grad():
            return {section: self._renew(texts, known[section]) for section, texts in wanted.items()}

    def _renew(self, texts: Prompts, known: EncodedPrompts) -> EncodedPrompts:
        made: dict[str, dict[str, Tensor | list[Tensor]]] = {}
        for name in ("positive", "negative", "blank", "away"):
            text, conditions = getattr(texts, name), getattr(known, name)
            if text is not None and conditions is not None:
                made[name] = dict(conditions)
                for encoder in self.learning:
                    made[name] |= encoder.encode([text])[0]
        return replace(known, **made)

    def _encode(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[Conditions]:
        if self._learns(encoder):
            return encoder.encode(prompts)
        with torch.no_grad():
            if can_divide(encoder) and encoder.blocks is not None:
                return take_turns(encoder.encode, prompts)
            return encoder.encode(prompts)

    def _learns(self, encoder: TextEncoder) -> bool:
        return any(encoder is one for one in self.learning)


NO_TEXTS = LiveTexts(())  # all texts come from caches


def _stack(values: Sequence[Tensor | list[Tensor]], is_varying: bool) -> Tensor | list[Tensor]:
    """Return one tensor B ..., or a list with an entry for each sample if their lengths vary."""
    rows = [value[0] if isinstance(value, list) else value for value in values]
    return rows if is_varying or isinstance(values[0], list) else torch.stack(rows)
