"""Checkpoint files of FLUX's autoencoder: recognise their dialects and read dimensions from the tensors.

Our modules have the names of the released ae.safetensors. diffusers' AutoencoderKL has its own.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from encoders.autoencoder_blocks import AutoencoderConfig
from modules.checkpoints.dialects import (
    LoadPlan,
    Names,
    checked_shapes_of,
    count,
    other_kind,
    rename_sources,
    translate_name,
)
from modules.checkpoints.encoders import ALL_IN_ONE, check_groups, stated_groups
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.checkpoints.sources import TensorSource
from modules.errors import CheckpointError

LATENT_CHANNELS = 16
LEVELS = 4  # resolutions, each half of the one before: 8 pixels are one latent pixel
GROUPS = 32  # in a group norm, as released; cannot be read from the tensors
RELEASE = "ae.safetensors of FLUX.1 or the folder vae of its diffusers release"
CONFIG_CLASSES = {"AutoencoderKL"}  # in a config.json beside the file

DIFFUSERS: Names = (  # which counts the decoder's levels from the latents: see `_our_name`
    (r"encoder\.down_blocks\.(\d+)\.(.+)", r"encoder.down.\1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.(.+)", r"\1.mid.attn_1.norm.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.(.+)", r"\1.mid.attn_1.\2.\3"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.(.+)", r"\1.mid.attn_1.proj_out.\2"),
    (r"(encoder|decoder)\.conv_norm_out\.(.+)", r"\1.norm_out.\2"),
)
DIFFUSERS_LEVEL: Names = (  # inside a numbered level
    (r"(.+\.\d+)\.resnets\.(.+)", r"\1.block.\2"),
    (r"(.+\.\d+)\.downsamplers\.0\.(.+)", r"\1.downsample.\2"),
    (r"(.+\.\d+)\.upsamplers\.0\.(.+)", r"\1.upsample.\2"),
)
SHORTCUT: Names = ((r"(.+)\.conv_shortcut\.(.+)", r"\1.nin_shortcut.\2"),)


def read_autoencoder(checkpoint: Checkpoint) -> LoadPlan[AutoencoderConfig]:
    """Plan how to load FLUX's autoencoder: released file, diffusers layout, or a part of an all-in-one file.

    Raises CheckpointError for any other file.
    """
    others = tuple(start for start in ALL_IN_ONE if start not in ("vae.", "first_stage_model."))
    checkpoint = checkpoint.without_prefix("first_stage_model.", "vae.", others=(*others, "model."))
    sources = plain_sources(checkpoint)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in sources:
        levels = count(sources, r"decoder\.up_blocks\.\d+")
        sources = rename_sources(sources, lambda name: _our_name(name, levels))
    wrong = other_kind(checkpoint, "the autoencoder of FLUX", "--ae", RELEASE)
    if "encoder.down.0.block.0.conv1.weight" not in sources or "decoder.conv_in.weight" not in sources:
        raise wrong
    for name, source in sources.items():  # 1x1 convolutions in the file, linear layers here
        if re.fullmatch(r".+\.attn_1\.(q|k|v|proj_out)\.weight", name):
            sources[name] = source.then(_as_matrix)
    shape = checked_shapes_of(checkpoint, sources, wrong)
    channels = shape("decoder.conv_in.weight")[1]
    if channels != LATENT_CHANNELS or "quant_conv.weight" in sources:
        raise CheckpointError(
            f"{checkpoint.path}: this VAE has {channels} latent channels"
            + (" and a quant_conv" if "quant_conv.weight" in sources else "")
            + f", FLUX's has {LATENT_CHANNELS} and none. Give {RELEASE}.",
            checkpoint.path,
        )
    widths = tuple(
        shape(f"encoder.down.{level}.block.0.conv1.weight")[0]
        for level in range(_levels(checkpoint, sources))
    )
    config = AutoencoderConfig(
        channels,
        _groups(checkpoint, widths),
        widths,
        count(sources, r"encoder\.down\.0\.block\.\d+"),
        count(sources, r"decoder\.up\.0\.block\.\d+"),
    )
    return LoadPlan(config, checkpoint, sources)


def _our_name(name: str, levels: int) -> str:
    up = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", name)
    if up:
        name = f"decoder.up.{levels - 1 - int(up[1])}.{up[2]}"
    for table in (DIFFUSERS, DIFFUSERS_LEVEL, SHORTCUT):
        name = translate_name(name, table)
    return name


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _levels(checkpoint: Checkpoint, sources: Mapping[str, TensorSource]) -> int:
    """Return the number of levels. Raises CheckpointError if it is not that of FLUX's autoencoder."""
    for start in (r"encoder\.down", r"decoder\.up"):
        found = count(sources, rf"{start}\.\d+")
        if found != LEVELS:
            raise CheckpointError(
                f"{checkpoint.path}: {start.replace(chr(92), '')} has {found} levels, that of FLUX has "
                f"{LEVELS}. The file holds another model, or tensors are missing. Give {RELEASE}.",
                checkpoint.path,
            )
    return LEVELS


def _groups(checkpoint: Checkpoint, widths: tuple[int, ...]) -> int:
    """Return the number of norm groups: as a config.json beside the file says, else as released.

    Raises CheckpointError if the channels cannot be divided into them.
    """
    groups = stated_groups(checkpoint, CONFIG_CLASSES) or GROUPS
    check_groups(checkpoint, widths, groups)
    return groups
