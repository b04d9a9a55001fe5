"""MiniMax-H3's audio: waveforms to latents and back.

The audio VAE is a class of diffusers, always in float32: its weight-normed convolutions lose 20 dB in bf16.
Each channel of stereo audio is processed separately. Latents are those of the model: means of the posterior,
normalized per channel. Its settings are derived from the sizes in the file.
"""
# Letters: B batch, S samples, Z latent channels, A latents of audio in time

import logging
import warnings
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
)
from checkpoints.encoders import declared_settings
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from minimax_h3.released import AUDIO_MEAN, AUDIO_STD
from modules.errors import CheckpointError
from modules.installation import hide_packages
from protocols.data import Audio

logger = logging.getLogger(__name__)

RATE = 32000  # samples a second
LATENTS_A_SECOND = 40
CHANNELS = 2
DILATIONS = (1, 3, 5)
HEADS = 8
DIFFUSERS_CLASS = "AutoencoderKLMiniMaxH3Audio"
# suffix of a tensor's name in files -> in the network: magnitude and direction of a weight
WEIGHT_NORM_SUFFIXES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
MODEL_KIND = "an audio VAE of MiniMax-H3"
FILES = "minimax_h3_audio_vae_fp32.safetensors of Comfy-Org, or audio_vae/ of MiniMaxAI/MiniMax-H3"
Settings = Mapping[str, Any]  # settings of a class of diffusers
Shape = Callable[..., tuple[int, ...]]


def latent_count(frames: int, fps: float) -> int:
    """Return how many audio latents a clip has: 40 per second, or 2 for a single frame."""
    return round(frames / fps * LATENTS_A_SECOND)


class H3AudioVae:
    """Audio VAE, which encodes stereo audio at `rate` samples per second."""

    rate = RATE

    def __init__(self, network: Any) -> None:
        """Wrap diffusers' AutoencoderKLMiniMaxH3Audio in float32."""
        self._network = network

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = self._network.mean_proj.weight.device
        return device

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Encode audio to normalized posterior means, B Z 2 A float32, on the VAE's device.

        `waveform` is B 2 S in -1..1 at `rate`, on any device. Silence is added to fill the last latent.
        """
        channels = waveform.to(self.device, torch.float32).flatten(0, 1).unsqueeze(1)
        means = self._network.encode(channels).latent_dist.mode()
        mean, std = self._statistics()
        return ((means - mean) / std).unflatten(0, (-1, CHANNELS)).transpose(1, 2)

    def encode_clip(self, waveform: Tensor, frames: int, fps: float) -> Tensor:
        """Encode a clip's audio, cut or padded with silence, as B Z 2 A with A from `latent_count`.

        `waveform` is B 2 S in -1..1 at `rate`, of any length; `frames` and `fps` are the clip's.
        """
        latents = latent_count(frames, fps)
        samples = latents * self._hop
        waveform = waveform[..., :samples]
        return self.encode(functional.pad(waveform, (0, samples - waveform.shape[-1])))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Audio:
        """Decode normalized latents, 1 Z 2 A on any device, to audio."""
        mean, std = self._statistics()
        by_channel = latents[0].transpose(0, 1).to(self.device, torch.float32)  # 2 Z A
        waveform: Tensor = self._network.decode(by_channel * std + mean).sample
        return Audio(waveform[:, 0], self.rate)

    @property
    def _hop(self) -> int:
        return prod(self._network.config.encoder_rates)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return each latent channel's mean and standard deviation, both 1 Z 1."""
        config = self._network.config
        numbers = (config.latents_mean or AUDIO_MEAN, config.latents_std or AUDIO_STD)
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1) for values in numbers)
        return mean, std


def read_audio_vae(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load the audio VAE of MiniMax-H3. `option` is the option that named the file.

    Raises CheckpointError for any other file.
    """
    sources = list_tensor_sources(checkpoint)
    rejection = make_wrong_kind_error(checkpoint, MODEL_KIND, option, FILES)
    if "pre_block.attn.zero_k_bias" not in sources or "decoder.ups.0.0.weight_v" not in sources:
        raise rejection
    shape = make_shape_reader(checkpoint, sources, rejection)
    latent_channels = shape("mean_proj.weight", 3)[0]
    num_stages, num_blocks = (count(sources, rf"decoder\.{name}\.\d+") for name in ("ups", "resblocks"))
    settings = {
        "encoder_dim": shape("encoder.block.0.weight_v", 3)[0],
        "encoder_rates": _read_encoder_rates(shape, count(sources, r"encoder\.block\.\d+\.block\.4")),
        "latent_dim": shape("dec_in_proj.weight", 3)[0],
        "latent_channels": latent_channels,
        "num_attention_heads": HEADS,
        "sampling_rate": RATE,
        **_read_decoder_settings(shape, num_stages, num_blocks),
        **_read_settings_without_tensors(checkpoint),
    }
    statistics = (settings.get("latents_mean", AUDIO_MEAN), settings.get("latents_std", AUDIO_STD))
    fits = all(_are_numbers(numbers, latent_channels) for numbers in statistics)
    # encoder and decoder must change the length by the same factor
    if not fits or prod(settings["encoder_rates"]) != prod(settings["decoder_rates"]):
        raise rejection
    return LoadPlan(settings, checkpoint, rename_sources(sources, _parametrized))


def _read_settings_without_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings in config.json that no tensor shows, as far as it has them."""
    _, declared = declared_settings(checkpoint, {DIFFUSERS_CLASS})
    keys = ("num_attention_heads", "latents_mean", "latents_std")
    return {key: declared[key] for key in keys if declared.get(key) is not None}


def _parametrized(name: str) -> str:
    """Translate a file's tensor name to the name under PyTorch's weight_norm parametrization."""
    path, _, end = name.rpartition(".")
    return f"{path}.{WEIGHT_NORM_SUFFIXES[end]}" if end in WEIGHT_NORM_SUFFIXES else name


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == count and all(type(x) is float for x in values)


def _read_encoder_rates(shape: Shape, stages: int) -> tuple[int, ...]:
    """Return the stride of each encoder stage: half the kernel size of its convolution."""
    return tuple(
        shape(f"encoder.block.{stage}.block.4.weight_v", 3)[2] // 2 for stage in range(1, stages + 1)
    )


def _read_decoder_settings(shape: Shape, stages: int, blocks: int) -> dict[str, Any]:
    """Return the audio decoder's settings from its tensor shapes."""
    # An upsampling rate follows from its kernel, whose size is 2 * rate or 2 * rate - 1.
    kernels = tuple(shape(f"decoder.ups.{stage}.0.weight_v", 3)[2] for stage in range(stages))
    block_kernels = []
    for block in range(blocks // stages):
        block_kernels.append(shape(f"decoder.resblocks.{block}.convs1.0.weight_v", 3)[2])
    return {
        "decoder_dim": shape("decoder.conv_pre.weight_v", 3)[0],
        "decoder_rates": tuple((kernel + 1) // 2 for kernel in kernels),
        "decoder_kernel_sizes": kernels,
        "resblock_kernel_sizes": tuple(block_kernels),
        "resblock_dilation_sizes": (DILATIONS,) * len(block_kernels),
    }


def load_audio_vae(path: Path, device: torch.device, option: str = "--audio_vae") -> H3AudioVae:
    """Load the audio VAE of MiniMax-H3: a file, or diffusers' folder.

    `option` is the option that named the path. Raises CheckpointError if the file is damaged or contains
    another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_audio_vae(checkpoint, option)
        network = load_planned(
            plan, build_audio_vae, device, torch.float32, label="the audio VAE of MiniMax-H3"
        )
    logger.info("Audio VAE: %s", path)
    return H3AudioVae(network)


def build_audio_vae(settings: Settings) -> nn.Module:
    """Build the network for `on_meta_device`. Raises CheckpointError if diffusers lacks it.

    diffusers normalizes weights with a function that PyTorch has replaced by parametrizations, and that warns
    for each layer. The result has parametrizations instead, with weights of other names
    (`WEIGHT_NORM_SUFFIXES`).
    """
    with hide_packages("bitsandbytes"):  # diffusers would import it without need
        try:
            from diffusers import AutoencoderKLMiniMaxH3Audio  # takes seconds to import
        except ImportError as error:
            raise CheckpointError(
                "the audio VAE of MiniMax-H3 needs diffusers 0.42 or newer. Type: pip install -U diffusers"
            ) from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*weight_norm` is deprecated", category=FutureWarning)
        network: Any = AutoencoderKLMiniMaxH3Audio(**settings)
    for module in network.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
                weight_norm(module, hook.name, hook.dim)
    return network
