"""What Stable Diffusion 1.x, 2.x and XL are called: our names of U-Nets are those of diffusers.

Their aliases are the names of the released single files (LDM), by which sd-scripts names the modules of LoRAs
for SDXL. Blocks are listed one by one, because LDM counts residual blocks through all levels; `{n}` is the
transformer block: SDXL has several in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from networks.names.layouts import OF_CLIP, UNET_IN_DIFFUSERS, FamilyNames, Sides, with_endings
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry("stable_diffusion")

_LAYERS = 2  # residual blocks of a level on the way down; one more on the way up
Pairs = tuple[tuple[str, str], ...]  # (path in LDM, ours)

RESIDUAL = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_TRANSFORMER = (
    *with_endings("attn1.", "to_q to_k to_v to_out.0"),
    *with_endings("attn2.", "to_q to_k to_v to_out.0"),
    *with_endings("", "ff.net.0.proj ff.net.2 norm1 norm2 norm3"),
)
ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
ADDED = (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"))


class BlockPaths(NamedTuple):
    """Paths of one residual block or attention of a U-Net, in LDM and here."""

    released: str  # in LDM
    ours: str
    is_attention: bool


class SamplerPaths(NamedTuple):
    """Paths of a downsampler and of the upsampler with the same level index, in LDM and diffusers."""

    released_down: str  # in LDM
    released_up: str  # in LDM, if the upsampler's level has attentions, which come before it
    released_up_alone: str  # in LDM, if the level has none
    down: str
    up: str


def unet_blocks(layers: Sequence[int]) -> Iterator[BlockPaths]:
    """Yield the paths of all residual blocks of a U-Net and of the attentions that may follow them.

    Args:
        layers: Number of residual blocks of each level of the down path.
    """
    down = 0  # index in input_blocks; 0 is the first convolution
    up = 0  # index in output_blocks
    for level, (num_down, num_up) in enumerate(zip(layers, layers[::-1], strict=True)):
        for layer in range(num_down):
            down += 1
            yield BlockPaths(f"input_blocks.{down}.0", f"down_blocks.{level}.resnets.{layer}", False)
            yield BlockPaths(f"input_blocks.{down}.1", f"down_blocks.{level}.attentions.{layer}", True)
        down += 1  # the downsampler
        for layer in range(num_up + 1):  # the up path has one more block on each level
            yield BlockPaths(f"output_blocks.{up}.0", f"up_blocks.{level}.resnets.{layer}", False)
            yield BlockPaths(f"output_blocks.{up}.1", f"up_blocks.{level}.attentions.{layer}", True)
            up += 1
    yield BlockPaths("middle_block.0", "mid_block.resnets.0", False)
    yield BlockPaths("middle_block.1", "mid_block.attentions.0", True)
    yield BlockPaths("middle_block.2", "mid_block.resnets.1", False)


def unet_samplers(layers: Sequence[int]) -> Iterator[SamplerPaths]:
    """Yield the paths of the samplers between the levels of a U-Net, in LDM's and in diffusers' naming.

    In LDM's lists an upsampler is layer 2 of its block, or layer 1 if the block has no attention
    (`released_up_alone`).

    Args:
        layers: Number of residual blocks of each level of the down path.
    """
    down = 0  # index in input_blocks, LDM's list
    up = 0  # index in output_blocks
    # the last level of each path has no sampler; the up path goes through the levels in reverse
    for level, (num_down, num_up) in enumerate(zip(layers[:-1], layers[:0:-1], strict=True)):
        down += num_down + 1  # the downsampler follows the level's blocks
        up += num_up + 1  # one more block; the upsampler is part of the last one
        yield SamplerPaths(
            released_down=f"input_blocks.{down}.0.op",
            released_up=f"output_blocks.{up - 1}.2.conv",
            released_up_alone=f"output_blocks.{up - 1}.1.conv",
            down=f"down_blocks.{level}.downsamplers.0.conv",
            up=f"up_blocks.{level}.upsamplers.0.conv",
        )


def _pair_names(levels: int, transformer: str, plain: tuple[int, ...]) -> Pairs:
    """Return the pairs of published and diffusers' names of all modules of a U-Net.

    Args:
        levels: Number of levels.
        transformer: Index of the transformer block, or `{n}`.
        plain: Levels of the up path that have no attention in the released models.
    """
    pairs: list[tuple[str, str]] = [*ENDS]
    inside = [
        *with_endings("", "norm proj_in proj_out"),
        *with_endings(f"transformer_blocks.{transformer}.", " ".join(_TRANSFORMER)),
    ]
    layers = (_LAYERS,) * levels
    for theirs, ours, is_attention in unet_blocks(layers):
        if is_attention:
            pairs += [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in inside]
        else:
            pairs += [(f"{theirs}.{their_leaf}", f"{ours}.{our_leaf}") for their_leaf, our_leaf in RESIDUAL]
    for level, sampler in enumerate(unet_samplers(layers)):
        pairs.append((sampler.released_down, sampler.down))
        # both paths of the upsampler are read; the one in the released models comes first
        released_paths = [sampler.released_up, sampler.released_up_alone]
        if level in plain:
            released_paths.reverse()
        pairs += [(path, sampler.up) for path in released_paths]
    return tuple(pairs)


_SD = _pair_names(4, "0", (0,))
_SDXL = (*_pair_names(3, "{n}", (2,)), *ADDED)
_OF_TEXTS: Sides = ((".attn2.to_k", 0, 1), (".attn2.to_v", 0, 1))


SD1 = FamilyNames(
    "sd1",
    "stable-diffusion-v1",
    aliases=_SD,
    start=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    always_underscored="ours",
    compatible_families=("sd2",),  # has the same names; only sizes differ
    encoders=(("lora_te", OF_CLIP),),
    texts_in_diffusers=("lora_te",),
    written_version="sd_v1",
    sides=_OF_TEXTS,
    released=((768, ()),),
    versions=("sd_v1", "sd_1", "sd1", "stable-diffusion-v1"),
)
# the same modules with other sizes
SD2 = replace(
    SD1,
    name="sd2",
    architecture="stable-diffusion-v2",
    compatible_families=("sd1",),
    written_version="sd_v2",
    released=((1024, ()),),
    versions=("sd_v2", "sd_2", "sd2", "stable-diffusion-v2"),
)
SDXL = FamilyNames(
    "sdxl",
    "stable-diffusion-xl-v1-base",
    aliases=_SDXL,
    encoders=(("lora_te1", OF_CLIP), ("lora_te2", OF_CLIP)),
    texts_in_diffusers=("lora_te1", "lora_te2"),
    start=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    always_underscored="aliases",
    written_version="sdxl_base_v1-0",
    sides=_OF_TEXTS,
    released=((2048, ()),),
    versions=("sdxl", "stable-diffusion-xl"),
)

LORA = (SD1, SDXL, SD2)
_CONTROL_NET = "a ControlNet (gen_img.py --control_net_models)"
MARKS: Marks = (
    ("zero_convs.0.0.weight", _CONTROL_NET),
    ("controlnet_down_blocks.0.weight", _CONTROL_NET),
    (
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",
        "a ControlNet-LLLite (gen_img.py --control_net_lllite_models)",
    ),
    ("input_blocks.0.0.weight", "a Stable Diffusion checkpoint (--ckpt)"),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", "the U-Net of Stable Diffusion in diffusers layout"),
)
