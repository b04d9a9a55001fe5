"""Checkpoint files of the HunyuanVideo VAE: recognize their dialects and read dimensions from the tensors.

Our modules have the names of the official file, which diffusers keeps. ComfyUI's repackaged file has its own.
"""

import re
from collections.abc import Mapping

from checkpoints import dialects
from checkpoints.encoders import check_groups, declared_groups
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.autoencoder import as_matrices
from hunyuan_model.vae_blocks import DOWN, UP, HunyuanVaeConfig
from modules.errors import CheckpointError
from protocols.loading import TensorSource

LATENT_CHANNELS = 16
MAX_GROUPS = 32  # in a group norm: as in the released VAE, whose narrowest level has 128 channels
RELEASE = "the official vae/pytorch_model.pt, hunyuan_video_vae_bf16.safetensors or a diffusers vae folder"
CONFIG_CLASSES = {"AutoencoderKLCausal3D", "AutoencoderKLHunyuanVideo"}  # in a config.json next to the file

COMFY: dialects.Names = (  # ComfyUI counts the decoder's levels from the end: see `_translate_comfy_name`
    (r"encoder\.down\.(\d+)\.(.+)", r"encoder.down_blocks.\1.\2"),
    (r"(encoder|decoder)\.mid\.block_1\.(.+)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.mid\.block_2\.(.+)", r"\1.mid_block.resnets.1.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.(.+)", r"\1.mid_block.attentions.0.group_norm.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.(.+)", r"\1.mid_block.attentions.0.to_\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.(.+)", r"\1.mid_block.attentions.0.to_out.0.\2"),
    (r"(encoder|decoder)\.norm_out\.(.+)", r"\1.conv_norm_out.\2"),
)
COMFY_LEVEL: dialects.Names = (  # inside a numbered level
    (r"(.+_blocks\.\d+)\.block\.(\d+)\.nin_shortcut\.(.+)", r"\1.resnets.\2.conv_shortcut.\3"),
    (r"(.+_blocks\.\d+)\.block\.(.+)", r"\1.resnets.\2"),
    (r"(.+_blocks\.\d+)\.downsample\.(.+)", r"\1.downsamplers.0.\2"),
    (r"(.+_blocks\.\d+)\.upsample\.(.+)", r"\1.upsamplers.0.\2"),
)


def read_vae(checkpoint: Checkpoint) -> dialects.LoadPlan[HunyuanVaeConfig]:
    """Plan how to load a HunyuanVideo VAE from an official, diffusers or ComfyUI file.

    Raises CheckpointError for any other file.
    """
    checkpoint = checkpoint.without_prefix(
        "module.",
        "_orig_mod.",
        "first_stage_model.",
        "vae.",
        ignored_prefixes=("model.diffusion_model.", "model.model.", "text_encoders."),
    )
    names = checkpoint.tensors
    if "encoder.conv_in.conv.weight" not in names or "quant_conv.weight" not in names:
        raise dialects.make_wrong_kind_error(checkpoint, "a HunyuanVideo VAE", "--vae", RELEASE)
    sources = list_tensor_sources(checkpoint)
    if "encoder.down.0.block.0.conv1.conv.weight" in names:  # ComfyUI's file, with its own names
        levels_up = dialects.count(sources, r"decoder\.up\.\d+")
        sources = dialects.rename_sources(sources, lambda name: _translate_comfy_name(name, levels_up))
        as_matrices(sources, r".+\.attentions\.0\.to_.+\.weight")
    shape = dialects.make_shape_reader(checkpoint, sources)
    # The number of norm groups from config.json, else 32, but at least two channels per group.
    declared = declared_groups(checkpoint, CONFIG_CLASSES)
    config = HunyuanVaeConfig(
        latent_channels=shape("post_quant_conv.weight")[0],
        groups=(
            declared
            if declared is not None
            else max(1, min(MAX_GROUPS, (shape("encoder.conv_in.conv.weight")[0]) // 2))
        ),
        encoder=_read_widths(checkpoint, sources, "encoder.down_blocks", len(DOWN) + 1),
        encoder_blocks=dialects.count(sources, r"encoder\.down_blocks\.0\.resnets\.\d+"),
        decoder=_read_widths(checkpoint, sources, "decoder.up_blocks", len(UP) + 1),
        decoder_blocks=dialects.count(sources, r"decoder\.up_blocks\.0\.resnets\.\d+"),
    )
    if config.latent_channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{checkpoint.path}: this VAE has {config.latent_channels} latent channels, HunyuanVideo's "
            f"has {LATENT_CHANNELS}. Pass {RELEASE} to --vae.",
            checkpoint.path,
        )
    check_groups(checkpoint, (*config.encoder, *config.decoder), config.groups)
    return dialects.LoadPlan(config, checkpoint, sources)


def _translate_comfy_name(name: str, levels: int) -> str:
    up = re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", name)
    if up:
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{up[2]}"
    return dialects.translate_name(dialects.translate_name(name, COMFY), COMFY_LEVEL)


def _read_widths(
    checkpoint: Checkpoint, sources: Mapping[str, TensorSource], start: str, levels: int
) -> tuple[int, ...]:
    """Return the channels of each level."""
    num_levels = dialects.count(sources, re.escape(start) + r"\.\d+")
    if num_levels != levels:
        raise CheckpointError(
            f"{checkpoint.path}: {start} has {num_levels} levels, HunyuanVideo's has {levels}. "
            f"The file contains another model, or tensors are missing. Pass {RELEASE} to --vae.",
            checkpoint.path,
        )
    shape = dialects.make_shape_reader(checkpoint, sources)
    return tuple(shape(f"{start}.{level}.resnets.0.conv1.conv.weight")[0] for level in range(levels))
