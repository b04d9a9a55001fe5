"""Module names of the U-Nets of Stable Diffusion 1.x, 2.x and XL: ours are those of diffusers.

Their aliases are the names of the released single files (LDM), by which sd-scripts names the modules of LoRAs
for SDXL. Blocks are listed one by one, because LDM counts residual blocks through all levels; `{n}` is the
transformer block: SDXL has several in a row. At the end text encoders, of all models: LoRA files name their
modules by published paths.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from networks.names.layouts import OF_CLIP, UNET_IN_DIFFUSERS, FamilyNames, Sides, each

_LAYERS = 2  # residual blocks of a level on the way down; one more on the way up
Pairs = tuple[tuple[str, str], ...]  # (path in LDM, ours)

RESIDUAL = (
    *(("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj")),
    *(("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")),
)
_TRANSFORMER = (
    *each("attn1.", "to_q to_k to_v to_out.0"),
    *each("attn2.", "to_q to_k to_v to_out.0"),
    *each("", "ff.net.0.proj ff.net.2 norm1 norm2 norm3"),
)
ENDS = (
    *(("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")),
    *(("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")),
)
ADDED = (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"))


def unet_blocks(layers: Sequence[int]) -> Iterator[tuple[str, str, bool]]:
    """Yield (path in LDM, ours, whether it is an attention rather than a residual block).

    layers: residual blocks of each level on the way down.
    """
    down = up = 0
    for level, (left, right) in enumerate(zip(layers, layers[::-1], strict=True)):
        for layer in range(left):
            down += 1
            yield f"input_blocks.{down}.0", f"down_blocks.{level}.resnets.{layer}", False
            yield f"input_blocks.{down}.1", f"down_blocks.{level}.attentions.{layer}", True
        down += 1  # it makes the features smaller
        for layer in range(right + 1):
            yield f"output_blocks.{up}.0", f"up_blocks.{level}.resnets.{layer}", False
            yield f"output_blocks.{up}.1", f"up_blocks.{level}.attentions.{layer}", True
            up += 1
    yield "middle_block.0", "mid_block.resnets.0", False
    yield "middle_block.1", "mid_block.attentions.0", True
    yield "middle_block.2", "mid_block.resnets.1", False


def unet_samplers(layers: Sequence[int]) -> Iterator[tuple[str, tuple[str, str], str, str]]:
    """Yield the paths in LDM, and ours, of what changes the size behind each level.

    The one on the way up follows the attention, if there is one: its path is the first, else the second.
    """
    down = up = 0
    for level, (left, right) in enumerate(zip(layers[:-1], layers[:0:-1], strict=True)):
        down, up = down + left + 1, up + right + 1
        ways = (f"output_blocks.{up - 1}.2.conv", f"output_blocks.{up - 1}.1.conv")
        own = f"down_blocks.{level}.downsamplers.0.conv", f"up_blocks.{level}.upsamplers.0.conv"
        yield f"input_blocks.{down}.0.op", ways, *own


def _pairs(levels: int, transformer: str, plain: tuple[int, ...]) -> Pairs:
    """Return all modules of a U-Net.

    transformer: number of its transformer blocks, or `{n}`. plain: levels on the way up without attention, in
    the released models.
    """
    pairs: list[tuple[str, str]] = [*ENDS]
    inside = [
        *each("", "norm proj_in proj_out"),
        *each(f"transformer_blocks.{transformer}.", " ".join(_TRANSFORMER)),
    ]
    layers = (_LAYERS,) * levels
    for theirs, ours, is_attention in unet_blocks(layers):
        leaves = [(leaf, leaf) for leaf in inside] if is_attention else RESIDUAL
        pairs += [(f"{theirs}.{leaf}", f"{ours}.{own}") for leaf, own in leaves]
    for level, (smaller, larger, down, up) in enumerate(unet_samplers(layers)):
        # the usual name first
        pairs += [(smaller, down), *((place, up) for place in (larger[::-1] if level in plain else larger))]
    return tuple(pairs)


_SD, _SDXL = _pairs(4, "0", (0,)), (*_pairs(3, "{n}", (2,)), *ADDED)
_OF_TEXTS: Sides = ((".attn2.to_k", 0, 1), (".attn2.to_v", 0, 1))


SD1 = FamilyNames(
    "sd1",
    "stable-diffusion-v1",
    aliases=_SD,
    start=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    always_underscored="ours",
    takes=("sd2",),  # by names; sizes tell them apart
    encoders=(("lora_te", OF_CLIP),),
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
    takes=("sd1",),
    written_version="sd_v2",
    released=((1024, ()),),
    versions=("sd_v2", "sd_2", "sd2", "stable-diffusion-v2"),
)
SDXL = FamilyNames(
    "sdxl",
    "stable-diffusion-xl-v1-base",
    aliases=_SDXL,
    encoders=(("lora_te1", OF_CLIP), ("lora_te2", OF_CLIP)),
    start=UNET_IN_DIFFUSERS,
    is_as_in_diffusers=True,
    always_underscored="aliases",
    written_version="sdxl_base_v1-0",
    sides=_OF_TEXTS,
    released=((2048, ()),),
    versions=("sdxl", "stable-diffusion-xl"),
)
# the paths of our own classes -> the published ones; a class of transformers has the published ones already
_PUBLISHED = (
    (r"encoder\.layers\.(\d+)\.(.+)", r"text_model.encoder.layers.\1.\2"),  # CLIP
    (r"blocks\.(\d+)\.attn\.([qkvo])", r"encoder.block.\1.layer.0.SelfAttention.\2"),  # T5
    (r"blocks\.(\d+)\.ffn\.gate\.0", r"encoder.block.\1.layer.1.DenseReluDense.wi_0"),
    (r"blocks\.(\d+)\.ffn\.fc1", r"encoder.block.\1.layer.1.DenseReluDense.wi_1"),
    (r"blocks\.(\d+)\.ffn\.fc2", r"encoder.block.\1.layer.1.DenseReluDense.wo"),
)


def _translated(table: Pairs, name: str) -> str | None:
    """Return a name by the first pattern of a table that is all of it; None if there is none."""
    found = ((re.fullmatch(pattern, name), target) for pattern, target in table)
    return next((match.expand(target) for match, target in found if match is not None), None)


def published_path(path: str) -> str:
    """Return the published path of a module of a text encoder; an unknown path is one already."""
    return _translated(_PUBLISHED, path) or path


def published_parameter(name: str) -> str:
    """Return the published name of a parameter of a text encoder."""
    path, _, leaf = name.rpartition(".")
    return f"{published_path(path)}.{leaf}".lstrip(".")


# OpenCLIP's names -> Hugging Face's, below `text_model.`
_OPEN_CLIP = (
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_final\.(\w+)", r"final_layer_norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
)
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")  # q, k and v by rows


def open_clip_names(name: str) -> list[tuple[str, int | None]]:
    """Return Hugging Face's names, below `text_model.`, of what a tensor of OpenCLIP's text encoder holds.

    Each with the third of the rows that it is, None: all. Nothing for a tensor that it does not have.
    """
    if fused := _FUSED.fullmatch(name):
        layer = f"encoder.layers.{fused[1]}.self_attn."
        return [(f"{layer}{x}_proj.{fused[2]}", third) for third, x in enumerate("qkv")]
    found = _translated(_OPEN_CLIP, name)
    return [] if found is None else [(found, None)]


# names of modules in LoRA files -> their paths in diffusers' pipelines
_CLIP_LAYER = r"_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)"
_IN_DIFFUSERS = (
    (f"lora_te1?{_CLIP_LAYER}", r"text_encoder.text_model.encoder.layers.\1.\2.\3"),
    (f"lora_te2{_CLIP_LAYER}", r"text_encoder_2.text_model.encoder.layers.\1.\2.\3"),
    (
        r"lora_te3_encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_(\w+)",
        r"text_encoder_2.encoder.block.\1.layer.\2.\3.\4",
    ),
)


def diffusers_path_of_text(name: str) -> str | None:
    """Return the path of a text encoder's module in diffusers' pipelines, None if they have none."""
    return _translated(_IN_DIFFUSERS, name)
