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
_VAE_LEVELS = 4
_VAE = (
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.", r"\1.mid.attn_1."),
    (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
)


def released_unet_names(layers: list[int], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the released name and our name of each weight of a U-Net.

    Args:
        layers: Number of residual blocks of each level of the down path.
        names: Names of the U-Net's weights.
    """
    paths = {ours: released for released, ours in (*ENDS, *ADDED)}
    for released, ours, is_attention in unet_blocks(layers):
        if is_attention:
            paths[ours] = released
        else:
            paths |= {f"{ours}.{our_part}": f"{released}.{part}" for part, our_part in RESIDUAL}
    for sampler in unet_samplers(layers):
        attentions = sampler.up.replace("upsamplers.0.conv", "attentions.")
        has_attention = any(name.startswith(attentions) for name in names)
        paths[sampler.down] = sampler.released_down
        paths[sampler.up] = sampler.released_up if has_attention else sampler.released_up_alone
    for name in names:
        start = name  # shortened until it is the path of a renamed module
        while start not in paths:
            start = start.rpartition(".")[0]
        yield f"{UNET}{paths[start]}{name.removeprefix(start)}", name


def released_vae_name(name: str) -> str:
    """Return the released name of a weight of the VAE."""
    place = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.", name)
    if place is not None:  # counted from the smallest features, released ones from the largest
        part = "block" if place[2] == "resnets" else "upsample"
        name = f"decoder.up.{_VAE_LEVELS - 1 - int(place[1])}.{part}.{name[place.end() :]}"
    for pattern, released in _VAE:
        name = re.sub(pattern, released, name)
    return f"{VAE}{name}"


def released_vae_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor in a released file: its VAE has 1x1 convolutions as attention layers."""
    is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
    return (*shape, 1, 1) if is_attention and len(shape) == 2 else shape


def released_text_names(kind: ModelKind, number: int, names: Collection[str]) -> dict[str, list[str]]:
    """Return, for each tensor of a released file, which of a text encoder's weights it joins.

    Args:
        kind: Kind of the checkpoint.
        number: Index of the encoder.
        names: Our names of the encoder's weights.
    """
    start, is_open_clip = TEXTS[kind][number]
    if not is_open_clip:
        return {f"{start}text_model.{name}": [name] for name in names}
    outside = ["token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"]
    joined = {f"{start}{released}": _list_parts(released) for released in outside}
    if PROJECTION in names:
        joined[f"{start}text_projection"] = [PROJECTION]
    layer_pattern = re.compile(r"encoder\.layers\.(\d+)\.")
    layers = sorted({int(match[1]) for match in map(layer_pattern.match, names) if match})
    for layer in layers:
        joined |= _name_layer(start, layer, layer)
    if kind is SD2:  # released files have one layer more, which the model does not use
        joined |= _name_layer(start, layers[-1] + 1, layers[-1])
    return joined


_LAYER = ("ln_1.{}", "ln_2.{}", "mlp.c_fc.{}", "mlp.c_proj.{}", "attn.out_proj.{}", "attn.in_proj_{}")


def _name_layer(start: str, number: int, source: int) -> dict[str, list[str]]:
    """Return the tensors of one layer of OpenCLIP and the weights that each joins.

    Args:
        start: Prefix of the layers in the file.
        number: Index of the layer in the file.
        source: Path of our layer.
    """
    leaves = [leaf.format(part) for leaf in _LAYER for part in ("weight", "bias")]
    block = "transformer.resblocks"
    return {f"{start}{block}.{number}.{leaf}": _list_parts(f"{block}.{source}.{leaf}") for leaf in leaves}


def _list_parts(released: str) -> list[str]:
    """Return the names of our weights that one of OpenCLIP's tensors joins."""
    return [name for name, _ in open_clip_names(released)]
