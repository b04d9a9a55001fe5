"""A stand-in for a family that hears: its latents of sound are the samples themselves, folded.

Mix `ToySound` into any family: `class AudioWan(ToyAudio, Wan)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocols.data import Audio, AudioSpec
from protocols.family import Abilities
from tests.dataset.toy_family import ToyFamily

RATE = 1600  # samples in a second
PER_LATENT = 64  # samples: 25 latents in a second


def audio_shape(frames: int, fps: float) -> tuple[int, int, int]:
    """Return C T M of a clip's sound."""
    return 2, round(frames / fps * RATE / PER_LATENT), PER_LATENT


class ToyAudio:
    """The sound half of a family, whose networks do nothing."""

    audio: AudioSpec | None = AudioSpec(RATE, 2, audio_shape)
    audio_identity: Mapping[str, str] = {"audio_vae": "first"}

    def audio_networks(self, device: torch.device, decodes: bool) -> Any:
        return "decoder" if decodes else "encoder"

    def encode_audio(self, networks: Any, samples: Tensor, frames: int, fps: float) -> Tensor:
        """Return the samples B 2 S as B C T M; behind their end are zeros."""
        assert networks == "encoder"
        assert samples.shape[1:] == (2, round(frames / fps * RATE))
        _, length, width = audio_shape(frames, fps)
        missing = max(0, length * width - samples.shape[2])
        padded = torch.nn.functional.pad(samples, (0, missing))[..., : length * width]
        return padded.unflatten(2, (length, width))

    def decode_audio(self, networks: Any, latents: Tensor) -> Audio:
        """Return what `encode_audio` was given."""
        assert networks == "decoder"
        return Audio(latents[0].flatten(1).float(), RATE)


@dataclass
class HearingToy(ToyAudio, ToyFamily):
    """The toy family with sound; `heard` has the samples of each item."""

    abilities: Abilities = Abilities(trains_audio=True, takes_fps=True)
    audio: AudioSpec | None = ToyAudio.audio
    audio_identity: Mapping[str, str] = field(default_factory=lambda: {"audio_vae": "first"})
    heard: list[Tensor] = field(default_factory=list)

    def encode_audio(self, networks: Any, samples: Tensor, frames: int, fps: float) -> Tensor:
        self.heard.append(samples)
        return super().encode_audio(networks, samples, frames, fps)
