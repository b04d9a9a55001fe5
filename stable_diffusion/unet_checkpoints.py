"""The U-Net of a single file: dimensions from its tensors, and how diffusers' network is filled with them.

diffusers' classes take their dimensions as keywords; `UnetSizes` holds them, and is the only loose typing.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from modules.checkpoints.dialects import (
    LoadPlan,
    checked_shapes_of,
    count,
    rename_sources,
)
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError
from networks.names.stable_diffusion import ADDED, ENDS, RESIDUAL, unet_blocks, unet_samplers
from stable_diffusion.contract import SD1, SDXL, ModelKind
from stable_diffusion.kinds import GIVE


def read_levels(names: Collection[str]) -> tuple[int, ...]:
    """Return the residual blocks of each level on the way down. names: of the U-Net's tensors."""
    ends = sorted(
        int(found[1])
        for found in (re.fullmatch(r"input_blocks\.(\d{1,4})\.0\.op\.weight", name) for name in names)
        if found
    )
    numbers = {
        int(found[1]) for found in (re.match(r"input_blocks\.(\d{1,4})\.", name) for name in names) if found
    }
    bounds = [0, *ends, max(numbers, default=0) + 1]
    return tuple(end - start - 1 for start, end in zip(bounds, bounds[1:], strict=False))


def name_translator(names: Collection[str]) -> Callable[[str], str]:
    """Return a function: released name -> diffusers' name; one that it does not know stays as it is.

    names: of all tensors of the U-Net.
    """
    layers = read_levels(names)
    paths = dict((*ENDS, *ADDED))
    for theirs, ours, is_attention in unet_blocks(layers):
        inside = (("", ""),) if is_attention else ((f".{part}", f".{own}") for part, own in RESIDUAL)
        paths |= {theirs + part: ours + own for part, own in inside}
    for smaller, larger, down, up in unet_samplers(layers):
        paths |= {smaller: down, **dict.fromkeys(larger, up)}

    def translate(name: str) -> str:
        start = name
        while start:
            start = start.rpartition(".")[0]
            if start in paths:
                return paths[start] + name.removeprefix(start)
        return name

    return translate


UnetSizes = Mapping[str, Any]

GROUPS = 32  # of all group norms, as released; cannot be read from the tensors
SD1_HEADS = 8  # of each attention, as released
HEAD_WIDTH = 64  # of the later kinds
SIZE_NUMBERS = 6  # that SDXL is told: original size, crop, target size
USES = {4: "pictures", 9: "inpainting"}  # channels that the U-Net may take


def read_unet(checkpoint: Checkpoint, kind: ModelKind, pooled: int) -> LoadPlan[UnetSizes]:
    """Plan how to load the U-Net of a single file, whose prefix is cut off.

    pooled: width of SDXL's pooled text state; 0 for other kinds. Raises CheckpointError if tensors that tell
    a dimension are missing or make no sense.
    """
    names = checkpoint.tensors
    sources = rename_sources(plain_sources(checkpoint), name_translator(names))
    sizes = _Sizes(checkpoint, sources)
    layers = read_levels(names)
    for level, layer in enumerate(layers):  # a name with a large number would make a level endless
        if layer < 1 or layer != count(sources, rf"down_blocks\.{level}\.resnets\.\d+"):
            raise sizes.broken("some of its input_blocks are missing")
    widths = [sizes.shape(f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(len(layers))]
    down = [sizes.depths("down", level, layer) for level, layer in enumerate(layers)]
    up = [sizes.depths("up", level, layer + 1) for level, layer in enumerate(layers[::-1])]
    in_channels = sizes.shape("conv_in.weight")[1]
    if in_channels not in USES:
        raise CheckpointError(
            f"--ckpt {checkpoint.path}: its U-Net takes {in_channels} channels; those that take 4 (pictures) "
            f"and 9 (inpainting) can be used.\n  Give {GIVE}.",
            checkpoint.path,
        )
    has_middle = any(name.startswith("mid_block.attentions.0.") for name in sources)
    attended = next((depths for depths in down[::-1] if any(depths)), None)
    if attended is None or not has_middle:
        raise sizes.broken("it has no attention to the text")
    level = max(level for level, depths in enumerate(down) if any(depths))
    first = f"down_blocks.{level}.attentions.0."
    config: dict[str, Any] = {
        "sample_size": kind.size // 8,
        "in_channels": in_channels,
        "out_channels": sizes.shape("conv_out.weight")[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": tuple(_block_type(depths, "Down") for depths in down),
        "up_block_types": tuple(_block_type(depths, "Up") for depths in up),
        "norm_num_groups": GROUPS,
        "cross_attention_dim": sizes.shape(f"{first}transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "use_linear_projection": len(checkpoint.tensors[sources[f"{first}proj_in.weight"].names[0]].shape)
        == 2
        if f"{first}proj_in.weight" in sources
        else False,
        # diffusers' name for the number of heads
        "attention_head_dim": tuple(
            SD1_HEADS if kind is SD1 else max(1, width // HEAD_WIDTH) for width in widths
        ),
        **_depth_settings(down, up),
    }
    if kind is SDXL:
        config |= _told_sizes(sizes, pooled)
    heads = SD1_HEADS if kind is SD1 else HEAD_WIDTH
    for width, depths in zip(widths, down, strict=True):
        if width % GROUPS or (any(depths) and width % heads):
            raise sizes.broken(f"a width of {width} channels cannot be divided into groups and heads")
    return LoadPlan(config, checkpoint, sources)


class _Sizes:
    """Reads dimensions off tensors by diffusers' names."""

    def __init__(self, checkpoint: Checkpoint, sources: Mapping[str, TensorSource]) -> None:
        self.path = checkpoint.path
        self.sources = sources
        self.shape = checked_shapes_of(checkpoint, sources, self.broken("a tensor has another shape"))

    def broken(self, why: str) -> CheckpointError:
        """Return the error for a U-Net that cannot be one."""
        return CheckpointError(
            f"--ckpt {self.path}: its U-Net is not one of Stable Diffusion, or is damaged: {why}.\n"
            f"  Give {GIVE}.",
            self.path,
        )

    def depths(self, side: str, level: int, blocks: int) -> tuple[int, ...]:
        """Return the transformer layers beside each residual block of a level; 0: no attention."""
        start = rf"{side}_blocks\.{level}\.attentions"
        return tuple(
            count(self.sources, rf"{start}\.{place}\.transformer_blocks\.\d+") for place in range(blocks)
        )


def _block_type(depths: Sequence[int], way: str) -> str:
    return f"CrossAttn{way}Block2D" if any(depths) else f"{way}Block2D"


def _depth_settings(down: Sequence[Sequence[int]], up: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the transformer layers of all levels: one number each if they are alike, as released."""
    numbers = {level: set(depths) | set(up[len(down) - 1 - level]) for level, depths in enumerate(down)}
    if all(len(found) == 1 for found in numbers.values()):
        return {"transformer_layers_per_block": tuple(max(1, *numbers[level]) for level in numbers)}
    return {
        "transformer_layers_per_block": tuple(tuple(max(1, depth) for depth in depths) for depths in down),
        "reverse_transformer_layers_per_block": tuple(
            tuple(max(1, depth) for depth in depths) for depths in up
        ),
    }


def _told_sizes(sizes: _Sizes, pooled: int) -> dict[str, Any]:
    """Return the settings of SDXL's conditions beside the text: its pooled state, and sizes as waves."""
    width = sizes.shape("add_embedding.linear_1.weight", 2)[1]
    waves, rest = divmod(width - pooled, SIZE_NUMBERS)
    if rest or waves < 2 or waves % 2:
        raise sizes.broken(
            f"label_emb takes {width} numbers, which are not a pooled text of {pooled} and {SIZE_NUMBERS} "
            "sizes"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": waves,
        "projection_class_embeddings_input_dim": width,
    }
