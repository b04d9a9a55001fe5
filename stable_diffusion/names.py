"""What Stable Diffusion 1.x, 2.x and XL are called: U-Nets are named as in diffusers.

Their aliases are the names of the released single files (LDM), by which sd-scripts names the modules of LoRAs
for SDXL. Blocks are listed one by one, because LDM counts residual blocks through all levels; `{n}` is the
transformer block: SDXL has several in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from networks.names.layouts import CLIP_LAYER_PREFIX, UNET_IN_DIFFUSERS, FamilyNames, Sides, with_endings
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry("stable_diffusion")

_LAYERS = 2  # residual blocks of a level on the way down; one more on the way up
Pairs = tuple[tuple[str, str], ...]  # (path in LDM, path in diffusers)

RESNET_LAYERS = (
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
INPUT_AND_OUTPUT_LAYERS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
SDXL_EMBEDDING_LAYERS = (
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)


class BlockPaths(NamedTuple):
    """Module paths of one residual block or attention of a U-Net, in LDM and in diffusers."""

    ldm_path: str
    diffusers_path: str
    is_attention: bool


class SamplerPaths(NamedTuple):
    """Module paths of a downsampler and of the upsampler at the same level index, in LDM and in diffusers."""

    ldm_downsampler: str  # in LDM
    ldm_upsampler: str  # in LDM, if the upsampler's level has attentions, which come before it
    ldm_upsampler_without_attention: str  # in LDM, if the level has none
    downsampler: str
    upsampler: str


def unet_blocks(layers: Sequence[int]) -> Iterator[BlockPaths]:
    """Yield the LDM path and the diffusers path of each residual block of a U-Net and of its attention.

    An attention is listed after every residual block, even at levels without attention.

    Args:
        layers: Number of residual blocks of each level of the down path.
    """
    input_block = 0  # index in LDM's input_blocks; 0 is the first convolution
    output_block = 0  # index in LDM's output_blocks
    for level, (num_down, num_up) in enumerate(zip(layers, layers[::-1], strict=True)):
        for layer in range(num_down):
            input_block += 1
            block, level_path = f"input_blocks.{input_block}", f"down_blocks.{level}"
            yield BlockPaths(f"{block}.0", f"{level_path}.resnets.{layer}", is_attention=False)
            yield BlockPaths(f"{block}.1", f"{level_path}.attentions.{layer}", is_attention=True)
        input_block += 1  # the downsampler
        for layer in range(num_up + 1):  # the up path has one more block on each level
            block, level_path = f"output_blocks.{output_block}", f"up_blocks.{level}"
            yield BlockPaths(f"{block}.0", f"{level_path}.resnets.{layer}", is_attention=False)
            yield BlockPaths(f"{block}.1", f"{level_path}.attentions.{layer}", is_attention=True)
            output_block += 1
    yield BlockPaths("middle_block.0", "mid_block.resnets.0", is_attention=False)
    yield BlockPaths("middle_block.1", "mid_block.attentions.0", is_attention=True)
    yield BlockPaths("middle_block.2", "mid_block.resnets.1", is_attention=False)


def unet_samplers(layers: Sequence[int]) -> Iterator[SamplerPaths]:
    """Yield the LDM and diffusers paths of the samplers between adjacent levels of a U-Net.

    In LDM's lists an upsampler is layer 2 of its block, or layer 1 if the block has no attention
    (`ldm_upsampler_without_attention`).

    Args:
        layers: Number of residual blocks of each level of the down path.
    """
    input_block = 0  # index in LDM's input_blocks
    output_block = 0  # number of LDM's output_blocks so far
    # the last level of each path has no sampler; the up path goes through the levels in reverse
    for level, (num_down, num_up) in enumerate(zip(layers[:-1], layers[:0:-1], strict=True)):
        input_block += num_down + 1  # the downsampler follows the level's blocks
        output_block += num_up + 1  # one more block; the upsampler is part of the last one
        yield SamplerPaths(
            ldm_downsampler=f"input_blocks.{input_block}.0.op",
            ldm_upsampler=f"output_blocks.{output_block - 1}.2.conv",
            ldm_upsampler_without_attention=f"output_blocks.{output_block - 1}.1.conv",
            downsampler=f"down_blocks.{level}.downsamplers.0.conv",
            upsampler=f"up_blocks.{level}.upsamplers.0.conv",
        )


def _pair_names(num_levels: int, block_index: str, levels_without_attention: tuple[int, ...]) -> Pairs:
    """Return (LDM path, diffusers path) of all modules of a U-Net that a LoRA may change."""
    pairs: list[tuple[str, str]] = [*INPUT_AND_OUTPUT_LAYERS]
    attention_layers = [  # the same in both namings
        *with_endings("", "norm proj_in proj_out"),
        *with_endings(f"transformer_blocks.{block_index}.", " ".join(_TRANSFORMER)),
    ]
    layers = (_LAYERS,) * num_levels
    for block in unet_blocks(layers):
        layer_pairs: Sequence[tuple[str, str]] = RESNET_LAYERS
        if block.is_attention:
            layer_pairs = [(layer, layer) for layer in attention_layers]
        for ldm_layer, diffusers_layer in layer_pairs:
            pairs.append((f"{block.ldm_path}.{ldm_layer}", f"{block.diffusers_path}.{diffusers_layer}"))
    for level, sampler in enumerate(unet_samplers(layers)):
        pairs.append((sampler.ldm_downsampler, sampler.downsampler))
        # the upsampler's LDM path depends on whether its level has attention. Both paths are read, and the
        # first one is written: that of the released models
        ldm_upsamplers = [sampler.ldm_upsampler, sampler.ldm_upsampler_without_attention]
        if level in levels_without_attention:
            ldm_upsamplers.reverse()
        pairs += [(path, sampler.upsampler) for path in ldm_upsamplers]
    return tuple(pairs)


_SD = _pair_names(4, "0", (0,))
_SDXL = (*_pair_names(3, "{n}", (2,)), *SDXL_EMBEDDING_LAYERS)
_CROSS_ATTENTION_SIDES: Sides = ((".attn2.to_k", 0, 1), (".attn2.to_v", 0, 1))


SD1 = FamilyNames(
    "sd1",
    "stable-diffusion-v1",
    aliases=_SD,
    path_prefix=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    underscored_names="ours",
    compatible_families=("sd2",),  # has the same names; only sizes differ
    encoders=(("lora_te", CLIP_LAYER_PREFIX),),
    texts_in_diffusers=("lora_te",),
    written_base_model="sd_v1",
    relative_sizes=_CROSS_ATTENTION_SIDES,
    released_sizes=((768, ()),),
    version_prefixes=("sd_v1", "sd_1", "sd1", "stable-diffusion-v1"),
)
# the same modules with other sizes
SD2 = replace(
    SD1,
    name="sd2",
    architecture="stable-diffusion-v2",
    compatible_families=("sd1",),
    written_base_model="sd_v2",
    released_sizes=((1024, ()),),
    version_prefixes=("sd_v2", "sd_2", "sd2", "stable-diffusion-v2"),
)
SDXL = FamilyNames(
    "sdxl",
    "stable-diffusion-xl-v1-base",
    aliases=_SDXL,
    encoders=(("lora_te1", CLIP_LAYER_PREFIX), ("lora_te2", CLIP_LAYER_PREFIX)),
    texts_in_diffusers=("lora_te1", "lora_te2"),
    path_prefix=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    underscored_names="aliases",
    written_base_model="sdxl_base_v1-0",
    relative_sizes=_CROSS_ATTENTION_SIDES,
    released_sizes=((2048, ()),),
    version_prefixes=("sdxl", "stable-diffusion-xl"),
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
