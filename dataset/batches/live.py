"""Tables encoded in part while training: pictures that change each time, captions that vary."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dataset.cache.files import EMPTY, LatentName
from dataset.sources.media_source import MediaSource
from modules.media.buckets import Size


@dataclass(frozen=True)
class LiveTable:
    """Parts that training reads from a table's sources."""

    sources: Mapping[str, MediaSource]  # by stem
    texts: bool  # captions are not cached
    sizes: Mapping[str, Size] | None = None  # of pictures, by stem; None: their latents are cached

    @property
    def media(self) -> bool:
        """Return whether pictures are not cached."""
        return self.sizes is not None

    def latent_names(self, tag: str) -> list[str]:
        """Return the names that latent caches of its pictures would have. tag: the family's cache_tag."""
        return [LatentName(stem, size).file_name(tag) for stem, size in (self.sizes or {}).items()]

    def num_captions(self, stem: str) -> int:
        """Return how many captions a source has."""
        return 1 + len(self.sources[stem].more_captions)

    def caption(self, stem: str, number: int) -> str:
        """Return a caption of a source as its file has it. number: EMPTY for the empty one."""
        if number == EMPTY:
            return ""
        source = self.sources[stem]
        return (source.caption or "", *source.more_captions)[number]


@dataclass(frozen=True)
class LiveParts:
    """Parts of a batch that do not come from caches."""

    tables: Mapping[int, LiveTable] = field(default_factory=dict)  # by index
    # what was encoded for items of the batch, by their places: tensors without batch dimension
    encoded: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


NO_LIVE_PARTS = LiveParts()
