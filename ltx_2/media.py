"""The part of the family that encodes frames and audio to latents, and decodes them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from encoders.files import OneTransformer
from ltx_2.audio import AudioVae, Vocoder
from ltx_2.files import Ltx2Files
from ltx_2.options import NAME
from modules.media.pixels import to_pixels
from protocols import rules
from protocols.data import (
    Audio,
    AudioSpec,
    LatentSpec,
    MediaEncoders,
)
from protocols.inputs import SOURCES


class Ltx2Media(OneTransformer):
    """Base class of the family: the latents of both streams, as the files define them."""

    if TYPE_CHECKING:

        @property
        def files(self) -> Ltx2Files:
            """Return the model files of the run."""

        @property
        def name(self) -> str:
            """Name of the architecture in caches and saved files."""

    @property
    def latent(self) -> LatentSpec:
        """Return the video VAE's latent space."""
        return self.files.latent

    @property
    def audio(self) -> AudioSpec | None:
        """Return the format of the audio latents; None if the run has no audio."""
        return self.files.audio

    # images

    @property
    def source(self) -> rules.SourceRules:
        """Return what denoising may start from, given the media that this model takes."""
        return rules.SourceRules(SOURCES, NAME, True, frozenset({self.name}))

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Load the video VAE, or no encoder if the run has no video."""
        return MediaEncoders(self.files.load_vae(device) if self.files.has_images else None)

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode frames in model space; `seed` is unused because the posterior mean is taken."""
        vae = encoders.vae
        return vae.encode(to_pixels(frames.to(vae.device))).float()

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order; nothing if there is no video."""
        if encoders.vae is not None and latents.shape[2]:
            yield from encoders.vae.decode(latents)

    @property
    def audio_identity(self) -> Mapping[str, str]:
        """Return what cached audio depends on besides the samples."""
        return self.files.audio_identity()

    def audio_networks(self, device: torch.device, decodes: bool) -> tuple[AudioVae, Vocoder | None]:
        """Load the audio VAE, and for decoding also the vocoder."""
        return self.files.load_audio(device, decodes)

    def encode_audio(
        self, networks: tuple[AudioVae, Vocoder | None], samples: Tensor, frames: int, fps: float
    ) -> Tensor:
        """Encode the audio of clips, cut or padded with silence to their length, as B C T M."""
        return networks[0].encode_clip(samples, frames, fps)

    def decode_audio(self, networks: tuple[AudioVae, Vocoder | None], latents: Tensor) -> Audio:
        """Decode audio latents, 1 C T M, to a track: first to a mel spectrogram, then to samples."""
        vae, vocoder = networks
        assert vocoder is not None, "loaded to encode"
        return Audio(vocoder.decode(vae.decode(latents))[0], vocoder.rate)
