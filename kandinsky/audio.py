"""Kandinsky 6's sound: waveforms to latents, and latents by way of a mel spectrogram back to waveforms.

The audio VAE is MMAudio's and the vocoder is BigVGAN v2, both as classes of diffusers, always in float32:
errors of 16 bits add up in the vocoder's hundred convolutions. Latents are means of the posterior times the
release's scale, which no tensor shows: config.json next to the VAE's file has it.
"""
# Letters: B batch, S samples, L latents of the sound, M bins of the mel spectrogram, T its frames

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
)
from checkpoints.encoders import read_config_json
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from modules.installation import hide_packages
from protocols.data import Audio

logger = logging.getLogger(__name__)

RATE = 44100  # samples a second, in all releases
HOP = 512  # samples from one frame of the mel spectrogram to the next, in all releases
DOWNSAMPLING = 2  # frames of the mel spectrogram of a latent
FRAME_STEP = 4  # frames of a clip for each latent frame behind the first
VAE_FILES = "the folder audio_vae of a release of Kandinsky 6 for diffusers"
VOCODER_FILES = "the folder vocoder of a release of Kandinsky 6 for diffusers"
AUDIO_VAE, VOCODER = "--audio_vae", "--vocoder"
DILATIONS = (1, 3, 5)  # of the convolutions in a block of the vocoder; no tensor shows them
Settings = Mapping[str, Any]  # settings of a class of diffusers


def latent_count(frames: int, fps: float, rate: int = RATE, hop: int = HOP) -> int:
    """Return the number of latents of a clip's sound: 218 for 121 frames at 24 frames a second."""
    full_frames = (frames - 1) // FRAME_STEP * FRAME_STEP + 1
    return math.ceil(full_frames / fps * rate / (DOWNSAMPLING * hop))


def audio_shape(channels: int, rate: int, hop: int, frames: int, fps: float) -> tuple[int, int, int]:
    """Return the shape C L 1 of the latents of a clip's sound."""
    return channels, latent_count(frames, fps, rate, hop), 1


class KandinskyAudioVae:
    """MMAudio's VAE, which encodes mono sound."""

    def __init__(self, network: Any) -> None:
        """Wrap diffusers' MMAudioVAE in float32."""
        self._network = network

    @torch.no_grad()
    def encode_clip(self, waveform: Tensor, frames: int, fps: float) -> Tensor:
        """Encode a clip's sound, cut or padded with silence, as B C L 1 float32 with L from `latent_count`.

        `waveform` is B 1 S in -1..1, of any length; `frames` and `fps` are the clip's.
        """
        config = self._network.config
        count = latent_count(frames, fps, config.sample_rate, config.hop_length)
        samples = count * self._network.latent_hop_length
        waveform = waveform[:, 0, :samples].to(next(self._network.parameters()).device).float()
        waveform = functional.pad(waveform, (0, samples - waveform.shape[1]))
        latents: Tensor = self._network.encode(waveform).latent_dist.mode() * config.scaling_factor
        return latents.unsqueeze(3)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, B C L 1, to a mel spectrogram, B M 2L float32."""
        latents = latents.squeeze(3).to(next(self._network.parameters()).device).float()
        return self._network.decode(latents / self._network.config.scaling_factor).sample


class KandinskyVocoder:
    """BigVGAN v2, which turns mel spectrograms into sound."""

    def __init__(self, network: Any, rate: int) -> None:
        """Wrap diffusers' MMAudioVocoder in float32. `rate` are the samples a second of its sound."""
        self._network = network
        self.rate = rate

    @torch.no_grad()
    def decode(self, mel: Tensor) -> Audio:
        """Return the sound of one mel spectrogram, 1 M T on any device."""
        waveform: Tensor = self._network(mel.to(next(self._network.parameters()).device).float()).sample
        return Audio(waveform[0], self.rate)


# the sound's VAE, and the vocoder if sound is decoded
AudioNetworks = tuple[KandinskyAudioVae, KandinskyVocoder | None]


def read_audio_vae(checkpoint: Checkpoint) -> LoadPlan[Settings]:
    """Plan how to load MMAudio's VAE. Raises CheckpointError for another file, or if its scale is unknown."""
    sources = list_tensor_sources(checkpoint)
    rejection = make_wrong_kind_error(checkpoint, "MMAudio's VAE", AUDIO_VAE, VAE_FILES)
    if "encoder.mid.attn_1.qkv.weight" in sources and "decoder.learnable_gain" in sources:
        raise CheckpointError(
            f"{checkpoint.path} has the weights of MMAudio's VAE before they were normalized (v1-44). Pass "
            f"{VAE_FILES} to {AUDIO_VAE}.",
            checkpoint.path,
        )
    if "vae.encoder.mid.attn_1.qkv.weight" not in sources or "mel_converter.mel_basis" not in sources:
        raise rejection
    shape = make_shape_reader(checkpoint, sources, rejection)
    num_levels = count(sources, r"vae\.encoder\.down\.\d+")
    width, bins, _ = shape("vae.encoder.conv_in.weight", 3)
    widths = [shape(f"vae.encoder.down.{level}.block.0.conv1.weight", 3)[0] for level in range(num_levels)]
    settings = {
        "mel_bins": bins,
        "latent_channels": shape("vae.decoder.conv_in.weight", 3)[1],
        "hidden_channels": width,
        "channel_multipliers": tuple(level_width // width for level_width in widths),
        "layers_per_block": count(sources, r"vae\.encoder\.down\.0\.block\.\d+"),
        "n_fft": shape("mel_converter.hann_window", 1)[0],
        **_read_undeclared_settings(checkpoint),
    }
    return LoadPlan(settings, checkpoint, sources)


def _read_undeclared_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings in config.json that no tensor shows; the scale of the latents must be there."""
    path, declared = read_config_json(checkpoint.path)
    declared = declared if isinstance(declared, dict) else {}
    scale = declared.get("scaling_factor")
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(
            f'{path} has no "scaling_factor" above 0, by which releases of Kandinsky 6 differ: 0.5302, and '
            f"0.417 before the last tuning. Pass {VAE_FILES} to {AUDIO_VAE}, or copy its config.json there.",
            path,
        )
    rates = {"sample_rate": declared.get("sample_rate", RATE), "hop_length": declared.get("hop_length", HOP)}
    for name, rate in rates.items():
        if type(rate) is not int or rate < 1:
            raise CheckpointError(f'{path}: "{name}" is {rate!r}; it must be at least 1.', path)
    return {**rates, "scaling_factor": float(scale)}


def read_vocoder(checkpoint: Checkpoint) -> LoadPlan[Settings]:
    """Plan how to load BigVGAN v2. Raises CheckpointError for any other file."""
    sources = list_tensor_sources(checkpoint)
    rejection = make_wrong_kind_error(checkpoint, "BigVGAN's vocoder", VOCODER, VOCODER_FILES)
    if "ups.0.0.weight" not in sources or "activation_post.act.alpha" not in sources:
        raise rejection
    shape = make_shape_reader(checkpoint, sources, rejection)
    num_stages = count(sources, r"ups\.\d+")
    kernels: list[int] = [shape(f"ups.{stage}.0.weight", 3)[2] for stage in range(num_stages)]
    blocks_per_stage = count(sources, r"resblocks\.\d+") // num_stages
    block_kernels = [shape(f"resblocks.{block}.convs1.0.weight", 3)[2] for block in range(blocks_per_stage)]
    settings = {
        "num_mels": shape("conv_pre.weight", 3)[1],
        "upsample_initial_channel": shape("conv_pre.weight", 3)[0],
        "upsample_rates": tuple(kernel // 2 for kernel in kernels),  # as in all stages of the release
        "upsample_kernel_sizes": tuple(kernels),
        "resblock_kernel_sizes": tuple(block_kernels),
        "resblock_dilation_sizes": (DILATIONS,) * blocks_per_stage,
    }
    return LoadPlan(settings, checkpoint, sources)


def load_audio_vae(path: Path, device: torch.device) -> KandinskyAudioVae:
    """Load MMAudio's VAE from diffusers' folder; raise CheckpointError for another or a damaged file."""
    with open_checkpoint(path) as checkpoint:
        plan = read_audio_vae(checkpoint)
        network = load_planned(plan, build_audio_vae, device, torch.float32, label="MMAudio's VAE")
    logger.info("Audio VAE: %s, latents times %g", path, plan.config["scaling_factor"])
    return KandinskyAudioVae(network)


def load_vocoder(path: Path, device: torch.device, rate: int) -> KandinskyVocoder:
    """Load BigVGAN v2 from diffusers' folder; raise CheckpointError for another or a damaged file.

    `rate` are the samples a second of the sound from whose spectrograms it was trained.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vocoder(checkpoint)
        network = load_planned(plan, build_vocoder, device, torch.float32, label="BigVGAN's vocoder")
    logger.info("Vocoder: %s", path)
    return KandinskyVocoder(network, rate)


def build_audio_vae(settings: Settings) -> nn.Module:
    """Build the network of the audio VAE for `on_meta_device`."""
    return _build("MMAudioVAE", settings)


def build_vocoder(settings: Settings) -> nn.Module:
    """Build the network of the vocoder for `on_meta_device`."""
    return _build("MMAudioVocoder", settings)


def _build(name: str, settings: Settings) -> nn.Module:
    with hide_packages("bitsandbytes"):  # diffusers would import it without need
        import diffusers  # takes seconds to import

        build = getattr(diffusers, name, None)
    if build is None:
        raise CheckpointError(
            "the sound of Kandinsky 6 needs diffusers 0.42 or newer. Type: pip install -U diffusers"
        )
    network: nn.Module = build(**settings)
    return network
