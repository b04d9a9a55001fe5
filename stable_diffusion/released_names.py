"""Names of the released single files (LDM) for networks of folders in diffusers' layout."""

import re
from collections.abc import Collection, Iterator, Mapping

from networks.names.texts import open_clip_names
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.files import UNET, VAE
from stable_diffusion.names import ADDED, ENDS, RESIDUAL, unet_blocks, unet_samplers
from stable_diffusion.text_checkpoints import CLIP_L, OPEN_CLIP, PROJECTION, SD1_TEXT, SD2_TEXT

# for each text encoder of a kind: the prefix of its names, and whether it is OpenCLIP
TEXTS: Mapping[ModelKind, tuple[tuple[str, bool], ...]] = {
    SD1: ((SD1_TEXT, False),),
    SD2: ((SD2_TEXT, True),),
    SDXL: ((CLIP_L, False), (OPEN_CLIP, True)),
}
VAE_LEVELS = 4  # resolutions of the VAE: 8 pixels are one latent pixel
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("proj_out", "to_out.0"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
)
_VAE_SHORTCUT = ("nin_shortcut", "conv_shortcut")


def released_unet_names(layers: list[int], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the released name and our name of each weight of a U-Net.

    Args:
        layers: Number of residual blocks of each level of the down path.
        names: Names of the U-Net's weights.
    """
    paths: dict[str, str] = {}  # our path of a module -> its released path
    # modules before and after the blocks, and those of SDXL's additional conditions; the tables have the
    # released path first
    for released, ours in (*ENDS, *ADDED):
        paths[ours] = released
    for released, ours, is_attention in unet_blocks(layers):
        if is_attention:
            paths[ours] = released
        else:
            paths |= {f"{ours}.{our_part}": f"{released}.{part}" for part, our_part in RESIDUAL}
    for sampler in unet_samplers(layers):  # a downsampler and an upsampler between two levels
        # LDM numbers the modules of a block: with an attention, the upsampler is the third, else the second
        attentions = sampler.up.replace("upsamplers.0.conv", "attentions.")
        has_attention = any(name.startswith(attentions) for name in names)
        paths[sampler.down] = sampler.released_down
        paths[sampler.up] = sampler.released_up if has_attention else sampler.released_up_alone
    for name in names:
        start = name  # shortened until it is the path of a renamed module
        while start not in paths:
            start = start.rpartition(".")[0]
        yield f"{UNET}{paths[start]}{name.removeprefix(start)}", name


def _vae_paths(num_levels: int) -> Iterator[tuple[str, str]]:
    """Yield the published path and our path of each VAE module that has a different name here."""
    for side in ("encoder", "decoder"):
        yield f"{side}.norm_out.", f"{side}.conv_norm_out."
        for index in (0, 1):
            yield f"{side}.mid.block_{index + 1}.", f"{side}.mid_block.resnets.{index}."
        for released, ours in _VAE_ATTENTION:
            yield f"{side}.mid.attn_1.{released}.", f"{side}.mid_block.attentions.0.{ours}."
    for level in range(num_levels):
        # the decoder's levels are counted from the smallest features, released ones from the largest
        upward = num_levels - 1 - level
        yield f"encoder.down.{level}.block.", f"encoder.down_blocks.{level}.resnets."
        yield f"encoder.down.{level}.downsample.", f"encoder.down_blocks.{level}.downsamplers.0."
        yield f"decoder.up.{level}.block.", f"decoder.up_blocks.{upward}.resnets."
        yield f"decoder.up.{level}.upsample.", f"decoder.up_blocks.{upward}.upsamplers.0."


def released_vae_name(name: str) -> str:
    """Return the published name of a VAE weight."""
    released_shortcut, our_shortcut = _VAE_SHORTCUT
    for released, ours in _vae_paths(VAE_LEVELS):
        if name.startswith(ours):
            name = released + name.removeprefix(ours).replace(our_shortcut, released_shortcut)
            break
    return f"{VAE}{name}"


def map_vae_names(released_names: Collection[str], num_levels: int) -> dict[str, str]:
    """Map each published VAE name that diffusers spells differently to diffusers' name.

    Args:
        released_names: Names of the tensors, without the prefix of a whole checkpoint.
        num_levels: Number of levels of the decoder.
    """
    released_shortcut, our_shortcut = _VAE_SHORTCUT
    mapped = {}
    for released, ours in _vae_paths(num_levels):
        for name in released_names:
            if name.startswith(released):
                mapped[name] = ours + name.removeprefix(released).replace(released_shortcut, our_shortcut)
    return mapped


def released_vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape in a published file, whose VAE attentions are 1x1 convolutions."""
    is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    return (*shape, 1, 1) if is_attention and len(shape) == 2 else shape


def released_text_names(kind: ModelKind, number: int, names: Collection[str]) -> dict[str, list[str]]:
    """Map each tensor name of a published text encoder to our weights that are fused into it.

    Args:
        kind: Kind of the checkpoint.
        number: Index of the encoder.
        names: Our names of the encoder's weights.
    """
    start, is_open_clip = TEXTS[kind][number]
    if not is_open_clip:
        return {f"{start}text_model.{name}": [name] for name in names}
    not_in_layers = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"]
    joined = {f"{start}{released}": _list_parts(released) for released in not_in_layers}
    if PROJECTION in names:
        joined[f"{start}text_projection"] = [PROJECTION]
    layer_pattern = re.compile(r"encoder\.layers\.(\d+)\.")
    layers = sorted({int(match[1]) for match in map(layer_pattern.match, names) if match})
    for layer in layers:
        joined |= _name_layer(start, layer, layer)
    # released files have one layer more, which the model does not use: it gets the weights of the last one
    if kind is SD2:
        joined |= _name_layer(start, layers[-1] + 1, layers[-1])
    return joined


_LAYER = ("ln_1.{}", "ln_2.{}", "mlp.c_fc.{}", "mlp.c_proj.{}", "attn.out_proj.{}", "attn.in_proj_{}")


def _name_layer(start: str, number: int, source: int) -> dict[str, list[str]]:
    """Map each tensor of one OpenCLIP layer to our weights that it is fused from.

    Args:
        start: Prefix of the layers in the file.
        number: Index of the layer in the file.
        source: Path of our layer.
    """
    leaves = [leaf.format(part) for leaf in _LAYER for part in ("weight", "bias")]
    block = "transformer.resblocks"
    return {f"{start}{block}.{number}.{leaf}": _list_parts(f"{block}.{source}.{leaf}") for leaf in leaves}


def _list_parts(released: str) -> list[str]:
    """Return the names of our weights that are fused into one of OpenCLIP's tensors."""
    return [name for name, _ in open_clip_names(released)]
