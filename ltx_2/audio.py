"""LTX-2's audio: waveforms to latents, and latents by way of a mel spectrogram back to waveforms.

The audio VAE and the vocoders are classes of diffusers, always in float32, as in the official code: errors of
16 bits add up in the vocoder's hundred convolutions. Latents are those of the model: means of the posterior,
normalized with the statistics in the VAE's file. Settings are derived from tensor sizes; names are
diffusers', to which the official file's are translated.
"""
# Letters: B batch, C channels (2 of audio), S samples, T frames of a mel spectrogram or latent frames, M bins

import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from math import prod
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
    rename_sources,
)
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from ltx_2.released import select_part
from ltx_2.vae_checkpoints import STATISTICS, UNUSED
from modules.errors import CheckpointError
from modules.installation import hide_packages

logger = logging.getLogger(__name__)

# As trained: the official reader's defaults, which no release changes
RATE = 16000  # samples per second of encoded audio
HOP = 160  # samples from one mel frame to the next
WINDOW = 1024  # samples of a mel frame
MIN_MAGNITUDE = 1e-5  # lower limit of magnitudes before the logarithm
OUTPUT_RATE = 48000  # output rate of LTX-2.3's vocoder, in Hz; LTX-2's follows from its strides
MEL_DOWNSAMPLING = 4  # mel frames of one latent frame, mel bins of one latent bin
NUM_LEVELS = 3  # resolutions of the audio VAE: two steps that join two
FILES = "the official file of LTX-2 or LTX-2.3, its audio alone, or diffusers' folder"
VOCODER = (  # parts of names: official -> diffusers
    (r"\bconv_pre\b", "conv_in"),
    (r"\bconv_post\b", "conv_out"),
    (r"\bact_post\b", "act_out"),
    (r"\bups\b", "upsamplers"),
    (r"\bresblocks\b", "resnets"),
    (r"\bdownsample\.lowpass\b", "downsample"),
)
# kernel size -> stride, which no tensor shows: in all releases they go together
UPSAMPLINGS = {16: 6, 15: 5, 12: 6, 11: 5, 8: 2, 4: 2}
DILATIONS = (1, 3, 5)
Settings = Mapping[str, Any]  # settings of a class of diffusers
Shape = Callable[..., tuple[int, ...]]


def latent_count(frames: int, fps: float) -> int:
    """Return the number of latent frames of a clip's audio: 25 a second."""
    return round(frames / fps * RATE / HOP / MEL_DOWNSAMPLING)


def fit_audio(waveform: Tensor, frames: int, fps: float) -> Tensor:
    """Cut audio, B C S at 16 kHz, to a clip's length, or pad it with silence to at least one mel frame."""
    length = int(frames / fps * RATE)
    waveform = waveform[..., :length]
    return functional.pad(waveform, (0, max(length, WINDOW) - waveform.shape[-1]))


def log_mel(waveform: Tensor, bins: int) -> Tensor:
    """Return the logarithms of mel magnitudes, B C T M float32, T = S // 160 + 1, on the CPU.

    `waveform` is B C S at 16 kHz, with more than 512 samples. Filters are on Slaney's scale, of equal area.
    """
    samples = waveform.float().cpu()
    spectrum = torch.stft(
        samples.flatten(0, 1), WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True
    )
    mel = spectrum.abs().transpose(1, 2) @ _make_mel_filters(bins)  # BC T M
    return mel.clamp_(min=MIN_MAGNITUDE).log_().unflatten(0, samples.shape[:2])


@functools.cache
def _make_mel_filters(bins: int) -> Tensor:
    """Return each frequency's weight in each mel bin, frequencies x bins."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


class AudioVae:
    """Audio VAE, which encodes stereo audio at `rate` samples per second."""

    rate = RATE

    def __init__(self, network: Any) -> None:
        """Wrap diffusers' AutoencoderKLLTX2Audio in float32."""
        self._network = network

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        device: torch.device = self._network.latents_mean.device
        return device

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Return the normalized means of the posterior, B C T M float32, on the VAE's device.

        `waveform` is B 2 S in -1..1 at `rate`, on any device, with more than 512 samples. T is a quarter of
        the mel frames, rounded up. No latent frame depends on later ones.
        """
        mel = log_mel(waveform, self._network.config.mel_bins).to(self.device)
        mean, std = self._statistics()
        return (self._network.encode(mel).latent_dist.mode() - mean) / std

    def encode_clip(self, waveform: Tensor, frames: int, fps: float) -> Tensor:
        """Encode a clip's audio, cut or padded with silence, as B C T M with T from `latent_count`.

        `waveform` is B 2 S in -1..1 at `rate`, of any length; `frames` and `fps` are the clip's.
        """
        return self.encode(fit_audio(waveform, frames, fps))[:, :, : latent_count(frames, fps)]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents, B C T M, to a mel spectrogram, B 2 4T-3 M float32."""
        mean, std = self._statistics()
        return self._network.decode(latents.to(self.device).float() * std + mean).sample

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, 1 C 1 M, of each value of an audio latent."""
        shape = (1, self._network.config.latent_channels, 1, -1)
        return self._network.latents_mean.view(shape), self._network.latents_std.view(shape)


class Vocoder:
    """Convert mel spectrograms to audio at `rate` samples per second (24000 in LTX-2, 48000 in 2.3)."""

    def __init__(self, network: Any, rate: int) -> None:
        """Wrap diffusers' LTX2Vocoder or LTX2VocoderWithBWE in float32."""
        self._network = network
        self.rate = rate

    @torch.no_grad()
    def decode(self, mel: Tensor) -> Tensor:
        """Return the waveform, B 2 S float32 in -1..1, of a mel spectrogram B 2 T M on any device."""
        return self._network(mel.to(next(self._network.parameters()).device).float())


def read_audio_vae(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load the audio VAE of LTX-2 or LTX-2.3 from an official file or a diffusers folder.

    `option` is the option that named the file. Raises CheckpointError for any other file.
    """
    checkpoint = select_part(checkpoint, "audio_vae.")  # without the prefix that the official file gives it
    sources = rename_sources(list_tensor_sources(checkpoint), lambda name: STATISTICS.get(name, name))
    rejection = make_wrong_kind_error(checkpoint, "an audio VAE of LTX-2", option, f"{FILES} audio_vae")
    if "encoder.mid.block_1.conv1.conv.weight" not in sources or "latents_mean" not in sources:
        raise rejection
    shape = make_shape_reader(checkpoint, sources, rejection)
    base_width, num_audio_channels = shape("encoder.conv_in.conv.weight")[:2]
    num_levels = count(sources, r"encoder\.down\.\d+")
    latent_channels = shape("decoder.conv_in.conv.weight")[1]
    (values_per_frame,) = shape("latents_mean", 1)  # values in a latent frame: channels x mel bins
    if num_levels != NUM_LEVELS or values_per_frame % latent_channels:
        raise rejection
    level_widths = [
        shape(f"encoder.down.{level}.block.0.conv1.conv.weight")[0] for level in range(num_levels)
    ]
    settings = {
        "base_channels": base_width,
        "ch_mult": tuple(width // base_width for width in level_widths),
        "num_res_blocks": count(sources, r"encoder\.down\.0\.block\.\d+"),
        "in_channels": num_audio_channels,  # audio channels
        "output_channels": shape("decoder.conv_out.conv.weight")[0],
        "latent_channels": latent_channels,
        "mel_bins": MEL_DOWNSAMPLING * values_per_frame // latent_channels,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in sources,
        "norm_type": "pixel",
        "causality_axis": "height",  # no latent depends on later audio
    }
    return LoadPlan(settings, checkpoint, sources, UNUSED)


def read_vocoder(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load the vocoder of LTX-2 or LTX-2.3, from an official file or a diffusers folder.

    `option` is the option that named the file. The settings are for a vocoder with bandwidth extension
    if they have `bwe_in_channels`. Raises CheckpointError for any other file.
    """
    checkpoint = select_part(checkpoint, "vocoder.")
    sources = rename_sources(list_tensor_sources(checkpoint), _translate_vocoder_name)
    rejection = make_wrong_kind_error(checkpoint, "a vocoder of LTX-2", option, f"{FILES} vocoder")
    shape = make_shape_reader(checkpoint, sources, rejection)
    if "upsamplers.0.weight" in sources:  # LTX-2: no bandwidth extension
        settings = _read_generator(shape, sources, "", rejection)
        return LoadPlan({**settings, "final_act_fn": "tanh"}, checkpoint, sources)
    # LTX-2.3: a second generator adds the high frequencies
    if "vocoder.upsamplers.0.weight" not in sources or "mel_stft.mel_basis" not in sources:
        raise rejection
    window = shape("mel_stft.stft_fn.forward_basis", 3)[2]
    settings = _read_generator(shape, sources, "vocoder.", rejection)
    extension = _read_generator(shape, sources, "bwe_generator.", rejection)
    settings = {
        **settings,
        # as in the official code; diffusers' own settings leave the waveform unlimited here
        "final_act_fn": "clamp",
        **{f"bwe_{name}": setting for name, setting in extension.items()},
        "bwe_final_act_fn": None,
        "filter_length": window,
        "window_length": window,
        "num_mel_channels": shape("mel_stft.mel_basis", 2)[0],
    }
    return LoadPlan(settings, checkpoint, sources)


def _translate_vocoder_name(name: str) -> str:
    for official, ours in VOCODER:
        name = re.sub(official, ours, name)
    return name


def _read_generator(
    shape: Shape, names: Collection[str], start: str, rejection: CheckpointError
) -> dict[str, Any]:
    """Return the settings of one waveform generator, a vocoder or its bandwidth extension."""
    # `start` is the beginning of its tensor names.
    escaped = re.escape(start)
    num_upsamplings = count(names, rf"{escaped}upsamplers\.\d+")
    kernels = []
    for index in range(num_upsamplings):
        kernels.append(shape(f"{start}upsamplers.{index}.weight", 3)[2])
    if not kernels or not set(kernels) <= set(UPSAMPLINGS):
        raise rejection
    hidden_channels, in_channels, _ = shape(f"{start}conv_in.weight", 3)
    num_blocks = count(names, rf"{escaped}resnets\.\d+") // num_upsamplings
    block_kernels = []
    for block in range(num_blocks):
        block_kernels.append(shape(f"{start}resnets.{block}.convs1.0.weight", 3)[2])
    out_channels = shape(f"{start}conv_out.weight", 3)[0]
    # Snake activations have weights, leaky ReLU has none
    is_snake = f"{start}resnets.0.acts1.0.act.alpha" in names
    return {
        "in_channels": in_channels,
        "hidden_channels": hidden_channels,
        "out_channels": out_channels,
        "upsample_kernel_sizes": kernels,
        "upsample_factors": [UPSAMPLINGS[kernel] for kernel in kernels],
        "resnet_kernel_sizes": block_kernels,
        "resnet_dilations": [list(DILATIONS)] * num_blocks,
        "act_fn": "snakebeta" if is_snake else "leaky_relu",
        "antialias": is_snake,
        "final_bias": f"{start}conv_out.bias" in names,
    }


def load_audio_vae(path: Path, device: torch.device, option: str = "--audio_vae") -> AudioVae:
    """Load the audio VAE of LTX-2 or LTX-2.3 from the official file, its audio part, or diffusers' folder.

    `option` is the option that named the path. Raises CheckpointError if the file is damaged or contains
    another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_audio_vae(checkpoint, option)
        network = load_planned(plan, build_audio_vae, device, torch.float32, label="the audio VAE of LTX-2")
    logger.info("Audio VAE: %s", path)
    return AudioVae(network)


def load_vocoder(path: Path, device: torch.device, option: str = "--audio_vae") -> Vocoder:
    """Load the vocoder of LTX-2 or LTX-2.3 from any file that `read_vocoder` accepts.

    `option` is the option that named the path. Raises CheckpointError if the file is damaged or contains
    another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vocoder(checkpoint, option)
        network = load_planned(plan, build_vocoder, device, torch.float32, label="the vocoder of LTX-2").to(
            device
        )
    rate = OUTPUT_RATE if "bwe_in_channels" in plan.config else _read_rate(plan.config)
    logger.info("Vocoder: %s, %d samples a second", path, rate)
    return Vocoder(network, rate)


def build_audio_vae(settings: Settings) -> nn.Module:
    """Build the audio VAE's network for `on_meta_device`."""
    with hide_packages("bitsandbytes"):  # it would be loaded for nothing
        from diffusers import AutoencoderKLLTX2Audio  # takes seconds to import

    network: Any = AutoencoderKLLTX2Audio(**settings)
    return network


def _read_rate(settings: Settings) -> int:
    """Return the sample rate of a vocoder's audio."""
    return RATE // HOP * prod(settings["upsample_factors"])


def build_vocoder(settings: Settings) -> nn.Module:
    """Build the vocoder for `on_meta_device`, and compute the resampler's filter, which no file has."""
    with hide_packages("bitsandbytes"):
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE, UpSample1d

    network: Any
    if "bwe_in_channels" not in settings:
        network = LTX2Vocoder(**settings)
        return network
    low = _read_rate(settings)
    ratio = OUTPUT_RATE // low
    network = LTX2VocoderWithBWE(
        **settings,
        hop_length=prod(settings["bwe_upsample_factors"]) // ratio,
        input_sampling_rate=low,
        output_sampling_rate=OUTPUT_RATE,
    )
    # not on the meta device, because no file gives it values
    with torch.device("cpu"):
        network.resampler = UpSample1d(ratio=ratio, window_type="hann", persistent=False)
    return network
