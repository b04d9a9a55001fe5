"""LTX-2's latent upscalers: latents of a larger video, or of twice the frames, from those of a clip.

The network is diffusers' class, whose names the official files have, too. It takes latents as the VAE makes
them, without the model's normalization. Sizes and kind are derived from the tensors. If a resampler
multiplies sides by 3, no tensor shows its scale (1.5 or 0.75): the record of settings has it.
"""

import logging
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.model_files import read_once, require_file
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from ltx_2.released import read_settings
from ltx_2.vae_checkpoints import read_video_vae
from modules.devices import free_memory
from modules.errors import CheckpointError, OptionError
from modules.installation import hide_packages

logger = logging.getLogger(__name__)

SPATIAL, TEMPORAL = "--spatial_upsampler_path", "--temporal_upsampler_path"
FILES = "ltx-2.3-spatial-upscaler-x2-1.1.safetensors, or diffusers' folder latent_upsampler"
DIFFUSERS_CLASS = "LTX2LatentUpsamplerModel"
GROUPS = 32  # number of groups in all norms, as released
SCALES = {2: 2.0, 4: 4.0}  # factor of a resampler's pixel shuffle -> scale after its strided blur
Settings = Mapping[str, Any]  # settings of a class of diffusers


def is_upscaler(checkpoint: Checkpoint) -> bool:
    """Return whether a file is a latent upscaler."""
    return {"post_upsample_res_blocks.0.conv1.weight", "initial_conv.weight"} <= checkpoint.tensors.keys()


def read_upscaler(checkpoint: Checkpoint, option: str) -> LoadPlan[Settings]:
    """Plan how to load a latent upscaler, whose factors follow from its tensors.

    `option` is the option that named the file.

    Raises CheckpointError for any other file.
    """
    rejection = make_wrong_kind_error(checkpoint, "a latent upscaler of LTX-2", option, FILES)
    names = checkpoint.tensors
    sources = list_tensor_sources(checkpoint)
    if not is_upscaler(checkpoint):
        raise rejection
    shape = make_shape_reader(checkpoint, sources, rejection)
    axes = len(names["initial_conv.weight"].shape)
    width, channels = shape("initial_conv.weight", axes)[:2]
    is_rational = "upsampler.conv.weight" in names
    layer = "upsampler.conv.weight" if is_rational else "upsampler.0.weight"
    is_timed = layer in names and len(names[layer].shape) == 5
    width_out = shape(layer, 5 if is_timed else 4)[0]
    factor = _shuffle_factor(width_out, width, is_timed)
    if axes not in (4, 5) or width % GROUPS:
        raise rejection
    if factor is None or (factor > 2 and not is_rational):
        raise rejection
    # a factor of 3 is the numerator of a fraction whose denominator no tensor shows
    scale = _read_rational_scale(checkpoint, option) if factor == 3 else SCALES.get(factor, 2.0)
    # these names are the arguments of the network's class
    settings = {
        "in_channels": channels,
        "mid_channels": width,
        "num_blocks_per_stage": count(names, r"res_blocks\.\d+"),
        "dims": axes - 2,
        "spatial_upsample": factor > 1,
        "temporal_upsample": is_timed,
        "use_rational_resampler": is_rational,
        "rational_spatial_scale": scale,
    }
    return LoadPlan(settings, checkpoint, sources)


def _shuffle_factor(width_out: int, width: int, is_timed: bool) -> int | None:
    """Return a pixel shuffle's factor on height and width from its channels; None if it is not known."""
    # Each input pixel becomes a block of pixels, of two frames if the shuffle is over time too.
    block, remainder = divmod(width_out, width)
    factors_by_block = {2: 1, 8: 2} if is_timed else {4: 2, 9: 3, 16: 4}
    return None if remainder else factors_by_block.get(block)


def _read_rational_scale(checkpoint: Checkpoint, option: str) -> float:
    """Return a resampler's scale, whose numerator is 3; raise CheckpointError if it is not 1.5."""
    settings = read_settings(checkpoint, "", DIFFUSERS_CLASS)
    scale = settings.get("rational_spatial_scale", settings.get("spatial_scale"))
    if scale != 1.5:
        raise CheckpointError(
            f"{option} {checkpoint.path}: its settings, in the file or in config.json next to it, say a "
            f"scale of {scale}; 1.5 is known.\n  Pass {FILES}.",
            checkpoint.path,
        )
    return 1.5


class ScaleFactors(NamedTuple):
    """Factors by which upscalers multiply a clip's frames and its height and width."""

    frames: int
    spatial: Fraction


def read_scale_factors(path: Path, option: str, channels: int) -> ScaleFactors:
    """Return the factors by which an upscaler multiplies frames and sides of latents with `channels`.

    Raises CheckpointError for another file, OptionError if the upscaler belongs to the other option.
    """
    settings = read_once(require_file(path, option, "it enlarges latents"), _read_settings, option)
    if settings["in_channels"] != channels:
        raise CheckpointError(
            f"{option} {path} takes {settings['in_channels']} latent channels, the VAE makes {channels}.\n"
            "  Pass the upscaler of this release.",
            path,
        )
    is_spatial = settings["spatial_upsample"]
    if is_spatial != (option == SPATIAL):
        right_option = SPATIAL if is_spatial else TEMPORAL
        raise OptionError(f"{option} {path}: this upscaler is for {right_option}")
    side = Fraction(settings["rational_spatial_scale"]) if is_spatial else Fraction(1)
    return ScaleFactors(1 + settings["temporal_upsample"], side)  # a temporal upscaler doubles the frames


@torch.no_grad()
def enlarge(latents: Tensor, upscalers: Mapping[str, Path], vae: Path, dtype: torch.dtype) -> Tensor:
    """Apply the latent upscalers in turn; return normalized latents, B C F H W float32, on the same device.

    `upscalers` are files by their options, loaded one at a time. `vae` is the file with the statistics of
    latents.
    """
    mean, std = (statistic.to(latents.device) for statistic in read_once(vae, _read_statistics))
    # upscalers take unnormalized latents
    latents = latents.float() * std + mean
    for option, path in upscalers.items():
        network = load_upscaler(path, option, dtype, latents.device)
        logger.info("Latent upscaler: %s", path)
        latents = network(latents.to(dtype)).float()
        del network
        free_memory(latents.device)
    return (latents - mean) / std


def load_upscaler(path: Path, option: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a latent upscaler; raise CheckpointError for another file."""
    with open_checkpoint(path) as checkpoint:
        plan = read_upscaler(checkpoint, option)
        return load_planned(plan, build, device, dtype, label="the latent upscaler of LTX-2")


def build(settings: Settings) -> nn.Module:
    """Build diffusers' class from its config without importing bitsandbytes."""
    with hide_packages("bitsandbytes"):  # it would be loaded for nothing
        from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    network: Any = LTX2LatentUpsamplerModel(**settings)
    return network


def _read_settings(checkpoint: Checkpoint, option: str) -> Settings:
    return read_upscaler(checkpoint, option).config


def _read_statistics(checkpoint: Checkpoint) -> list[Tensor]:
    """Return the latents' mean and standard deviation, each 1 C 1 1 1 float32."""
    plan = read_video_vae(checkpoint)
    names = (plan.sources[name].names[0] for name in ("latents_mean", "latents_std"))
    return [plan.checkpoint.read(name).float().view(1, -1, 1, 1, 1) for name in names]
