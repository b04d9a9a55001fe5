"""LTX-2's sound: waveforms to latents, and latents by way of a mel spectrogram back to waveforms.

The audio VAE and the vocoders are classes of diffusers, always in float32, as in the official code: errors of
16 bits add up in the vocoder's hundred convolutions. Latents are those of the model: means of the posterior,
normalised with the numbers in the VAE's file.
"""
# Letters: B batch, C channels (2 of sound), S samples, T frames of a mel spectrogram or latent frames, M bins

import functools
import logging
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ltx_2.sound_checkpoints import JOINED, Settings, read_sound_vae, read_vocoder
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint

logger = logging.getLogger(__name__)

# As trained: the official reader's defaults, which no release changes
RATE = 16000  # samples a second of what is encoded
HOP = 160  # samples from one mel frame to the next
WINDOW = 1024  # samples of a mel frame
LEAST = 1e-5  # of a magnitude, before the logarithm
OUTPUT_RATE = 48000  # of LTX-2.3's vocoder; LTX-2's rate follows from its strides


def latent_count(frames: int, fps: float) -> int:
    """Return the latent frames of the sound of a clip: 25 a second."""
    return round(frames / fps * RATE / HOP / JOINED)


def fit_sound(waveform: Tensor, frames: int, fps: float) -> Tensor:
    """Cut sound, B C S at 16 kHz, to the length of a clip, or add silence; there is at least a mel frame."""
    length = int(frames / fps * RATE)
    waveform = waveform[..., :length]
    return functional.pad(waveform, (0, max(length, WINDOW) - waveform.shape[-1]))


def log_mel(waveform: Tensor, bins: int) -> Tensor:
    """Return the logarithms of the mel magnitudes, B C T M float32, T = S // 160 + 1, on the CPU.

    waveform: B C S at 16 kHz, more than 512 samples. Filters are on Slaney's scale, of equal area.
    """
    samples = waveform.float().cpu()
    spectrum = torch.stft(
        samples.flatten(0, 1), WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True
    )
    mel = spectrum.abs().transpose(1, 2) @ _mel_filters(bins)  # BC T M
    return mel.clamp_(min=LEAST).log_().unflatten(0, samples.shape[:2])


@functools.cache
def _mel_filters(bins: int) -> Tensor:
    """Return the share of each frequency in each bin, frequencies bins."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


class SoundVae:
    """The audio VAE. It encodes stereo sound at `rate` samples a second."""

    rate = RATE

    def __init__(self, network: Any) -> None:
        """network: diffusers' AutoencoderKLLTX2Audio in float32."""
        self._network = network

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self._network.latents_mean.device
        return device

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Return the normalised means of the posterior, B C T M float32, on the VAE's device.

        waveform: B 2 S in -1..1 at `rate`, on any device, more than 512 samples. T is a quarter of the mel
        frames, rounded up. No latent frame depends on later ones.
        """
        mel = log_mel(waveform, self._network.config.mel_bins).to(self.device)
        mean, std = self._statistics()
        return (self._network.encode(mel).latent_dist.mode() - mean) / std

    def encode_clip(self, waveform: Tensor, frames: int, fps: float) -> Tensor:
        """Return the latents of a clip's sound, cut or with silence added: B C T M, T as `latent_count`.

        waveform: as for `encode`, of any length. frames, fps: of the clip.
        """
        return self.encode(fit_sound(waveform, frames, fps))[:, :, : latent_count(frames, fps)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the mel spectrogram, B 2 4T-3 M float32, of normalised latents B C T M on any device."""
        mean, std = self._statistics()
        return self._network.decode(latents.to(self.device).float() * std + mean).sample

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, 1 C 1 M: one for each number of a latent frame."""
        channels = self._network.config.latent_channels
        mean, std = (
            one.view(1, channels, 1, -1) for one in (self._network.latents_mean, self._network.latents_std)
        )
        return mean, std


class Vocoder:
    """A vocoder: mel spectrograms to sound at `rate` samples a second (24000 in LTX-2, 48000 in LTX-2.3)."""

    def __init__(self, network: Any, rate: int) -> None:
        """network: diffusers' LTX2Vocoder or LTX2VocoderWithBWE in float32."""
        self._network = network
        self.rate = rate

    @torch.no_grad()
    def decode(self, mel: Tensor) -> Tensor:
        """Return the waveform, B 2 S float32 in -1..1, of a mel spectrogram B 2 T M on any device."""
        return self._network(mel.to(next(self._network.parameters()).device).float())


def load_sound_vae(path: Path, device: torch.device, option: str = "--audio_vae") -> SoundVae:
    """Load the audio VAE of LTX-2 or LTX-2.3: the official single file, its sound alone, diffusers' folder.

    option: that named the path. Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_sound_vae(checkpoint, option)
        network = load_planned(plan, build_sound_vae, device, torch.float32, "the audio VAE of LTX-2")
    logger.info("Audio VAE: %s", path)
    return SoundVae(network)


def load_vocoder(path: Path, device: torch.device, option: str = "--audio_vae") -> Vocoder:
    """Load the vocoder of LTX-2 or LTX-2.3, from the same kinds of files.

    option: that named the path. Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vocoder(checkpoint, option)
        network = load_planned(plan, build_vocoder, device, torch.float32, "the vocoder of LTX-2").to(device)
    rate = OUTPUT_RATE if "bwe_in_channels" in plan.config else _rate(plan.config)
    logger.info("Vocoder: %s, %d samples a second", path, rate)
    return Vocoder(network, rate)


def build_sound_vae(settings: Settings) -> nn.Module:
    """Build the network for `on_meta_device`."""
    from diffusers import AutoencoderKLLTX2Audio  # takes seconds to import

    network: Any = AutoencoderKLLTX2Audio(**settings)
    return network


def _rate(settings: Settings, prefix: str = "") -> int:
    """Return the samples a second that a generator makes of mel frames."""
    return RATE // HOP * prod(settings[f"{prefix}upsample_factors"])


def build_vocoder(settings: Settings) -> nn.Module:
    """Build the network for `on_meta_device`, but the filter of the resampler, which no file has."""
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE, UpSample1d

    network: Any
    if "bwe_in_channels" not in settings:
        network = LTX2Vocoder(**settings)
        return network
    low = _rate(settings)
    ratio = OUTPUT_RATE // low
    network = LTX2VocoderWithBWE(
        **settings,
        hop_length=prod(settings["bwe_upsample_factors"]) // ratio,
        input_sampling_rate=low,
        output_sampling_rate=OUTPUT_RATE,
    )
    with torch.device("cpu"):
        network.resampler = UpSample1d(ratio=ratio, window_type="hann", persistent=False)
    return network
