"""Tiny random parts of LTX-2 in diffusers, and their tensors in official files."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor

# released settings that a tiny VAE keeps; widths are an eighth or less of the released ones
VIDEO_VAES: Mapping[str, Mapping[str, Any]] = {
    "2.0": {
        "block_out_channels": (32, 64, 128, 256),
        "layers_per_block": (1, 2, 1, 1, 1),
        "decoder_block_out_channels": (32, 64, 128),
        "decoder_layers_per_block": (1, 2, 1, 1),
        "decoder_spatial_padding_mode": "reflect",
        "decoder_causal": False,
    },
    "2.3": {
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": (2, 1, 1, 1, 1),
        "decoder_block_out_channels": (32, 64, 64, 128),
        "decoder_layers_per_block": (1, 2, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_residual": (False,) * 4,
        "upsample_factor": (2, 2, 1, 2),
        "decoder_spatial_padding_mode": "zeros",
        "decoder_causal": False,
    },
}


def video_vae(version: str, **settings: Any) -> AutoencoderKLLTX2Video:
    """diffusers' video VAE with 16 latent channels and weights that keep values near 1."""
    shared = {"latent_channels": 16, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        vae = AutoencoderKLLTX2Video(**{**shared, **VIDEO_VAES[version], **settings}).eval()
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
    return vae.requires_grad_(False)


def video_vae_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' VAE under the names of the official single file."""
    levels = 1 + max(int(found) for found in re.findall(r"down_blocks\.(\d+)", " ".join(tensors)))
    renames = (
        (
            r"(up|down)_blocks\.(\d)\.(?:up|down)samplers\.0",
            lambda at: f"{at[1]}_blocks.{2 * int(at[2]) + 1}",
        ),
        (r"down_blocks\.(\d)\.resnets", lambda at: f"down_blocks.{2 * int(at[1])}.res_blocks"),
        (r"up_blocks\.(\d)\.resnets", lambda at: f"up_blocks.{2 * int(at[1]) + 2}.res_blocks"),
        (r"encoder\.mid_block\.resnets", f"encoder.down_blocks.{2 * levels}.res_blocks"),
        (r"decoder\.mid_block\.resnets", "decoder.up_blocks.0.res_blocks"),
        ("latents_mean", "per_channel_statistics.mean-of-means"),
        ("latents_std", "per_channel_statistics.std-of-means"),
    )
    named = {}
    for name, tensor in tensors.items():
        for theirs, ours in renames:
            name = re.sub(theirs, ours, name)
        named[f"vae.{name}"] = tensor.contiguous()
    return named


def audio_vae() -> AutoencoderKLLTX2Audio:
    """diffusers' audio VAE: 2 latent channels of 8 bins, mel spectrograms of 32 bins."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        vae = AutoencoderKLLTX2Audio(base_channels=16, latent_channels=2, mel_bins=32).eval()
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
    return vae.requires_grad_(False)


def vocoder(version: str) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """diffusers' vocoder for `audio_vae`, loud enough that some samples are cut off. Strides are released."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made: LTX2Vocoder | LTX2VocoderWithBWE
        if version == "2.0":
            made = LTX2Vocoder(in_channels=64, hidden_channels=32)
        else:
            made = LTX2VocoderWithBWE(
                in_channels=64,
                hidden_channels=64,
                final_act_fn="clamp",  # as in the official code
                bwe_in_channels=32,
                bwe_hidden_channels=32,
                filter_length=128,
                window_length=128,
                num_mel_channels=16,
            )
            made.mel_stft.mel_basis.uniform_()
            made.mel_stft.stft_fn.forward_basis.normal_()
            made.vocoder.conv_out.weight.data.mul_(20)
    return made.eval().requires_grad_(False)


def audio_vae_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' audio VAE under the names of the official single file."""
    statistics = {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}
    return {
        f"audio_vae.per_channel_statistics.{statistics[name]}"
        if name in statistics
        else f"audio_vae.{name}": tensor
        for name, tensor in tensors.items()
    }


def vocoder_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' vocoder under the names of the official single file."""
    renames = {
        "conv_in.": "conv_pre.",
        "conv_out.": "conv_post.",
        "act_out.": "act_post.",
        "upsamplers.": "ups.",
        "resnets.": "resblocks.",
        "downsample.filter": "downsample.lowpass.filter",
    }
    named = {}
    for name, tensor in tensors.items():
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        named[f"vocoder.{name}"] = tensor
    return named
