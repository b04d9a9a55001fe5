"""A family whose encoders are arithmetic: what is cached can be foretold, and what was asked of it is
counted.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dataset.options import CachingOptions
from modules.errors import DatasetError, MediaError
from protocols.data import (
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from protocols.family import Abilities, EncoderAbilities
from protocols.requests import Prompt
from protocols.rules import CountTokens, ReferenceRules, TokenCount, count_covered_characters

LATENT = LatentSpec(channels=2, stride=(4, 8, 8), pixel_step=16, frame_step=4, in_sections=True)
OPTIONS = CachingOptions(dataset_config=Path("data.toml"), device="cpu", num_workers=1)


def options(**changes: Any) -> CachingOptions:
    return replace(OPTIONS, **changes)


@dataclass
class ToyText:
    """A prompt becomes as many rows as it has words."""

    name: str = "t5"
    abilities: EncoderAbilities = EncoderAbilities()
    variable_length: frozenset[str] = frozenset({"t5"})
    identity: Mapping[str, str] = field(default_factory=lambda: {"t5": "first"})
    calls: list[str] = field(default_factory=list)
    loaded: int = 0
    bad: str = ""  # for this prompt the encoder gives NaN

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.name})

    def token_counter(self) -> CountTokens:
        """Count words, of which four are read."""

        def count(text: str) -> TokenCount:
            ends = [found.end() for found in re.finditer(r"\S+", text)]
            return TokenCount(text, len(ends), 4, count_covered_characters(ends, 4, len(text)))

        return count

    def load(self, device: torch.device) -> None:
        self.loaded += 1

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.calls += [prompt.text for prompt in prompts]
        values = [math.nan if prompt.text == self.bad else float(len(prompt.text)) for prompt in prompts]
        return [
            {self.name: [torch.full((len(p.text.split()), 4), value)]}
            for p, value in zip(prompts, values, strict=True)
        ]

    def free(self) -> None: ...


@dataclass
class ToyFamily:
    """Latents hold the mean of each clip; `seen` lists what was encoded, batch by batch, `media` what there
    was to see.
    """

    name: str = "toy"
    abilities: Abilities = Abilities()
    references: ReferenceRules | None = None
    cache_tag: str = "toy"
    latent: LatentSpec = LATENT
    defaults: SamplingDefaults = SamplingDefaults(4, 16.0, 5.0, None, 5.0, "unipc", 32, 32, 5)
    media_identity: Mapping[str, str] = field(default_factory=lambda: {"vae": "first"})
    sections: int = 0  # more than 0: as FramePack, that many files for each item
    refuses: str | None = None  # what is wrong with every table
    least_frames: int = 1  # of an item
    value: float | None = None  # instead of the mean
    text: list[ToyText] = field(default_factory=lambda: [ToyText()])
    text_keys: frozenset[str] = frozenset({"t5"})
    seen: list[tuple[str, ...]] = field(default_factory=list)
    media: list[MediaBatch] = field(default_factory=list)
    loaded: int = 0

    def text_encoders(self) -> Sequence[Any]:
        return self.text

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        self.loaded += 1
        return MediaEncoders(vae=None)

    def check_named_files(self) -> None: ...

    def check_table(self, table: MediaTable) -> None:
        if self.refuses is not None:
            raise DatasetError(f"{table.name}: {self.refuses}")

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        if frames < self.least_frames:
            raise MediaError(f"{frames} frames, {self.least_frames} are needed")
        return self.sections or None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        self.seen.append(media.keys)
        self.media.append(media)
        _, frames, height, width, _ = media.frames.shape
        if self.sections:
            frames = 4 * (media.table.window - 1) + 1
        shape = self.latent.shape(frames, height, width)[1:]
        found = []
        for index in range(len(media.keys)):
            mean = media.frames[index].float().mean().item() if self.value is None else self.value
            tensors = {"latents": torch.full(shape, mean, dtype=torch.bfloat16)}
            for control in media.control:
                tensors["latents_control"] = torch.full(
                    shape, control[index].float().mean().item(), dtype=torch.bfloat16
                )
            sections = range(self.sections) if self.sections else [None]
            found.append([CacheEntry(tensors, section=section) for section in sections])
        return found
